"""Alt texts cleaned into evidence: what becomes of the kinds of text that web pages have."""

import html
import pickle
import re
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.demo.alt_text import HOSTILE, SPAM, VAGUE
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from fusion_pipeline.perceive.alt_text import (
    AltText,
    AltTextConfig,
    Language,
    Reason,
    clean_all,
    clean_text,
)
from tests.toy import run_toy, toy_steps

KEPT = None
CONFIG = AltTextConfig()
MEN = ", ".join(f"a man with a {thing}" for thing in ("hat", "dog", "kite", "boat", "cake", "cat"))

EXAMPLES: list[tuple[str, str, Reason | None]] = [
    # What says something stays as it is, in every language, short or long, loud or quiet.
    ("Two children feed ducks at the pond.", "Two children feed ducks at the pond.", KEPT),
    ("BREAKING: FLOOD IN THE OLD TOWN", "BREAKING: FLOOD IN THE OLD TOWN", KEPT),
    ("Eine Schüssel Linsensuppe mit Brot", "Eine Schüssel Linsensuppe mit Brot", KEPT),
    ("L'église d'Auvers au printemps", "L'église d'Auvers au printemps", KEPT),
    ("¿Dónde está el faro de Mallorca?", "¿Dónde está el faro de Mallorca?", KEPT),
    ("Старый трамвай на мосту", "Старый трамвай на мосту", KEPT),
    ("Кішка спить на підвіконні", "Кішка спить на підвіконні", KEPT),
    ("富士山", "富士山", KEPT),
    ("白猫", "白猫", KEPT),
    ("夕焼けの港に停泊する漁船", "夕焼けの港に停泊する漁船", KEPT),
    ("경복궁의 가을 풍경", "경복궁의 가을 풍경", KEPT),
    ("नदी किनारे बैठा एक बूढ़ा आदमी", "नदी किनारे बैठा एक बूढ़ा आदमी", KEPT),
    ("قارب صيد صغير في الميناء", "قارب صيد صغير في الميناء", KEPT),
    ("سگی که در برف می‌دود", "سگی که در برف می‌دود", KEPT),  # the joiner is spelling
    ("כלב רץ על החוף", "כלב רץ על החוף", KEPT),
    ("ตลาดน้ำยามเช้า", "ตลาดน้ำยามเช้า", KEPT),
    ("Chợ nổi buổi sáng sớm", "Chợ nổi buổi sáng sớm", KEPT),
    ("Μικρό καΐκι στο λιμάνι", "Μικρό καΐκι στο λιμάνι", KEPT),
    ("Kedi pencerede uyuyor", "Kedi pencerede uyuyor", KEPT),
    ("Stara łódź rybacka na plaży", "Stara łódź rybacka na plaży", KEPT),
    ("Facebook logo", "Facebook logo", KEPT),  # a site's name with a word beside it is knowledge
    ("Boeing 747", "Boeing 747", KEPT),
    ("COVID-19 vaccination centre", "COVID-19 vaccination centre", KEPT),
    ("R2-D2", "R2-D2", KEPT),
    ("Bora Bora", "Bora Bora", KEPT),
    ("I <3 my dog, 5 < 6 & 7 > 2", "I <3 my dog, 5 < 6 & 7 > 2", KEPT),
    ("Harry Potter <Deluxe Edition>", "Harry Potter <Deluxe Edition>", KEPT),  # no HTML element
    ("a ❤️ shaped cake", "a ❤️ shaped cake", KEPT),
    ("📷 👩‍🚀 astronaut on the ladder", "astronaut on the ladder", KEPT),
    # Markup and entities, escaped once or more.
    ("A <b>red</b> kite over <i>the</i> dunes", "A red kite over the dunes", KEPT),
    ("H<sub>2</sub>O molecule<br>model", "H2O molecule model", KEPT),
    ("Fish &amp; chips &#8211; Brighton&nbsp;pier", "Fish & chips – Brighton pier", KEPT),
    ("Fish &amp;amp;amp; chips", "Fish & chips", KEPT),
    ("&lt;p&gt;Pot en terre cuite&lt;/p&gt;", "Pot en terre cuite", KEPT),
    ('Market hall <a HREF="http://x.exa', "Market hall", KEPT),  # cut off by the page's template
    ("Old mill<br", "Old mill", KEPT),
    ("Old mill <!-- ad:12", "Old mill", KEPT),
    ("is a <b or not?", "is a <b or not?", KEPT),
    ('<img src="a.jpg" alt="Snowy owl in flight">', "Snowy owl in flight", KEPT),
    ("<script>var x = 'cat';</script>Black cat on a roof", "Black cat on a roof", KEPT),
    ("<o:p></o:p>Bergsee mit Boot", "Bergsee mit Boot", KEPT),
    ("Portrait of {{ artist.name }} in oil", "Portrait of in oil", KEPT),
    ("<div class='img-wrap'><img alt=''></div>", "", Reason.HTML_ONLY),
    ("&nbsp;&nbsp;", "", Reason.HTML_ONLY),
    ("<style>.a{color:red}</style>", "", Reason.HTML_ONLY),
    ("{{ product.title }}", "", Reason.HTML_ONLY),
    ("&lt;br/&gt;&lt;br/&gt;", "", Reason.HTML_ONLY),
    # Characters: mojibake, decomposed accents, control and private-use characters, emoji runs.
    ("CafÃ© on the Plaza de EspaÃ±a", "Café on the Plaza de España", KEPT),
    ("Donâ€™t feed the pigeons", "Don’t feed the pigeons", KEPT),
    ("å¯Œå£«å±±", "富士山", KEPT),
    ("Cafe\u0301 am See", "Café am See", KEPT),
    ("Harbour\x00 at\r\n\tnight\u200b \ue900", "Harbour at night", KEPT),
    ("🔥🔥🔥 Lava flows into the sea 🌋🌊🌊", "Lava flows into the sea", KEPT),
    ("★★★★★", "", Reason.NO_LETTERS),
    ("😀😀😀", "", Reason.NO_LETTERS),
    ("   ", "", Reason.NO_LETTERS),
    ("12345 / 678", "", Reason.NO_LETTERS),
    ("---", "", Reason.NO_LETTERS),
    # Web addresses.
    ("https://shop.example/p?id=12", "", Reason.URL),
    ("www.example.org/bilder/", "", Reason.URL),
    ("smithceramics.com", "", Reason.URL),
    ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "", Reason.URL),
    ("Sand dunes at dawn https://t.example/ab1", "Sand dunes at dawn", KEPT),
    ("Ступени храма pic.twitter.com/aB3dE", "Ступени храма", KEPT),
    # File names; one that is written in words is read as those words.
    ("DSC_0123.JPG", "", Reason.FILE_NAME),
    ("IMG_0042", "", Reason.FILE_NAME),
    ("image042", "", Reason.FILE_NAME),
    ("header-bg-3", "", Reason.FILE_NAME),
    ("hero_banner_final_v2.gif", "", Reason.FILE_NAME),
    ("71fK2bXyLmL._AC_SL1500_.jpg", "", Reason.FILE_NAME),
    ("550e8400-e29b-41d4-a716-446655440000", "", Reason.FILE_NAME),
    ("Screenshot 2024-04-28 at 11.21.10 PM.png", "", Reason.FILE_NAME),
    ("WhatsApp Image 2020-05-01 at 10.11.12.jpeg", "", Reason.FILE_NAME),
    ("Bildschirmfoto 2023-01-05 um 12.00.01.png", "", Reason.FILE_NAME),
    ("photo.jpg", "", Reason.FILE_NAME),
    ("final_version_new.jpg", "", Reason.FILE_NAME),
    ("golden-retriever-puppy_02.jpg", "golden retriever puppy 02", KEPT),
    ("/media/2019/mont-saint-michel.webp", "mont saint michel", KEPT),
    ("File:Mont Saint-Michel at dawn.jpg", "Mont Saint-Michel at dawn", KEPT),
    ("Datei:Schloss Neuschwanstein 2013.jpg", "Schloss Neuschwanstein 2013", KEPT),
    ("富士山.jpg", "富士山", KEPT),
    # Site names, shop phrases, prompts to click: alone, or at the edges of a text.
    ("image", "", Reason.BOILERPLATE),
    ("Shutterstock", "", Reason.BOILERPLATE),
    ("main image", "", Reason.BOILERPLATE),
    ("Click to enlarge", "", Reason.BOILERPLATE),
    ("undefined", "", Reason.BOILERPLATE),
    ("Free shipping! Buy now - only $9.99", "", Reason.BOILERPLATE),
    ("1920x1080 wallpaper hd 4k", "", Reason.BOILERPLATE),
    ("Imagen de producto", "", Reason.BOILERPLATE),
    ("Produktbild", "", Reason.BOILERPLATE),
    ("画像", "", Reason.BOILERPLATE),
    ("点击查看大图", "", Reason.BOILERPLATE),
    ("Увеличить изображение", "", Reason.BOILERPLATE),
    ("Mountain goat on a cliff | Shutterstock", "Mountain goat on a cliff", KEPT),
    ("Blue vase - Etsy UK", "Blue vase", KEPT),
    ("Keukentafel van eikenhout - Bol.com", "Keukentafel van eikenhout", KEPT),
    ("Samurai cat T-shirt |on AliExpress", "Samurai cat T-shirt", KEPT),
    ("May be an image of two people and a tree", "two people and a tree", KEPT),
    ("Pink river dolphin - Amazon", "Pink river dolphin - Amazon", KEPT),  # shop or river?
    ("Amazon rainforest - Wikipedia", "Amazon rainforest", KEPT),
    ("Red scarf | Free Shipping | Handmade in Wales", "Red scarf | Handmade in Wales", KEPT),
    ("Tour Eiffel – 1889 – carte postale", "Tour Eiffel – 1889 – carte postale", KEPT),
    ("Orchid Stock Photo - 48213377", "Orchid", KEPT),
    ("Royalty-free stock photo of a tin robot", "a tin robot", KEPT),
    ("Image result for art deco lamp", "art deco lamp", KEPT),
    ("Bildergebnis für Fachwerkhaus", "Fachwerkhaus", KEPT),
    ("Résultat de recherche d'images pour \"tarte aux pommes\"", '"tarte aux pommes"', KEPT),
    ("「金閣寺」の画像検索結果", "「金閣寺」", KEPT),
    ("Картинки по запросу \"самовар\"", '"самовар"', KEPT),
    ("Wooden ladle (click to enlarge)", "Wooden ladle", KEPT),
    ("Holzlöffel - zum Vergrößern klicken", "Holzlöffel", KEPT),
    ("Cuchara de madera (haz clic para ampliar)", "Cuchara de madera", KEPT),
    ("木のスプーン 送料無料", "木のスプーン", KEPT),
    ("Harbour at night (photo)", "Harbour at night", KEPT),
    ("Harbour at night - gallery", "Harbour at night", KEPT),
    ("Linen shirt $24.90", "Linen shirt", KEPT),
    ("Leinenhemd 24,90 €", "Leinenhemd", KEPT),
    ("Платье красное, цена 1200 руб.", "Платье красное", KEPT),
    ("Плакат «Родина-мать зовёт!»", "Плакат «Родина-мать зовёт!»", KEPT),
    ("Blog » Travel » Old mill", "Blog » Travel » Old mill", KEPT),
    ("Bora Bora - Bora Bora Lagoon", "Bora Bora - Bora Bora Lagoon", KEPT),
    ("Man holding a sign up", "Man holding a sign up", KEPT),
    ("iPhone 13 Pro Max 256GB", "iPhone 13 Pro Max 256GB", KEPT),
    ("Red fox photo", "Red fox photo", KEPT),
    ("Mountain lake wallpaper 1920x1080 hd 4k", "Mountain lake", KEPT),
    # Lists: distinct words stay, stuffing goes; a phrase said again is said once.
    ("sea, sand, gull, pier, sunset, boat", "sea, sand, gull, pier, sunset, boat", KEPT),
    ("#sunset #beach #gull", "#sunset #beach #gull", KEPT),
    (MEN, MEN, KEPT),  # says again, but is no list of keywords
    ("red scarf red scarf red scarf", "red scarf", KEPT),
    ("Red scarf | Wool | red scarf", "Red scarf | Wool", KEPT),
    ("cheap shoes, buy shoes, shoes online, best shoes, shoes sale", "", Reason.KEYWORD_SPAM),
    (
        "cat wallpaper, dog wallpaper, cat picture, dog picture, cat photo, dog photo",
        "",
        Reason.KEYWORD_SPAM,
    ),
    ("cheap, best, top 10, deal, coupon, sale, discount, review", "", Reason.KEYWORD_SPAM),
    ("壁纸壁纸壁纸 高清壁纸 手机壁纸", "", Reason.KEYWORD_SPAM),
    (", ".join(a + b for a in "abcdefg" for b in ("ob", "ut", "im", "e")), "", Reason.KEYWORD_SPAM),
    # Too little to say anything.
    ("ok", "", Reason.TOO_SHORT),
    ("前", "", Reason.TOO_SHORT),
    ("A 1", "", Reason.TOO_SHORT),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "text", "reason"), EXAMPLES)
def test_what_becomes_of_a_text(raw: str, text: str, reason: Reason | None) -> None:
    assert clean_text(raw, CONFIG) == (text, reason)


def test_the_examples_speak_of_each_reason_and_of_many_scripts() -> None:
    reasons = {reason for _, _, reason in EXAMPLES}
    assert reasons == {None, *Reason} - {Reason.DUPLICATE}  # that one takes two texts
    scripts = {unicodedata.name(c).split()[0] for raw, _, _ in EXAMPLES for c in raw if c.isalpha()}
    assert len(scripts) >= 12


def test_demo_texts_that_say_nothing_are_all_dropped() -> None:
    vague = {clean_text(text.format(n=n), CONFIG)[1] for text in VAGUE for n in (1, 37, 999)}
    assert vague == {Reason.BOILERPLATE, Reason.FILE_NAME}
    spam = {clean_text(text.format(n=n), CONFIG)[1] for text in SPAM for n in (2, 37, 400)}
    assert spam == {Reason.BOILERPLATE, Reason.KEYWORD_SPAM}
    # What tries to command a reader is for prompts.untrusted; here only its markup counts.
    assert [clean_text(text, CONFIG)[1] for text in HOSTILE].count(Reason.HTML_ONLY) == 1


# --- properties ----------------------------------------------------------------------------------

PIECES = (
    "<b>", "</b>", "<br/>", "<a href='", "<!--", "-->", "<![if x]>", "<script>", "<Deluxe ", ">",
    "&amp;", "&lt;", "&#60;", "&amp;amp;lt;", "&", "{{", "}}", "{% x %}", "[caption x]", "(", ")",
    "\u00c3\u00a9", "\u00e2\u20ac\u2122", "e\u0301", "\u0958", "\ufb2c", "\u200d", "\u200b", "\x00",
    "🔥", "❤️", "👩‍🚀", "🇫🇷", "https://a.example/b", "a.com/", "a.com", "www.", "IMG_0042", ".jpg",
    "File:", "a_b", "stock photo", "image", "Etsy", " UK", "free shipping", "click to enlarge", "<",
    " | ", " - ", " » ", ", ", "#", "cat", "red scarf", "壁纸", "白猫", "घर", "ปลา", "قط", "$9.99",
    "1920x1080", " hd", " 4k", "12345", "7", " ", "\n", "\u3000", "«", "»", "_", "/", ".",
)  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@settings(max_examples=1500, deadline=None)
@given(raw=texts)
def test_cleaning_settles_and_adds_nothing(raw: str) -> None:
    text, reason = clean_text(raw, CONFIG)
    assert (text == "") == (reason is not None)
    assert clean_text(raw, CONFIG) == (text, reason)
    if text:
        assert clean_text(text, CONFIG) == (text, None)
    assert text == " ".join(text.split())
    unescaped = raw
    while (less := html.unescape(unescaped)) != unescaped:
        unescaped = less
    assert len(text) <= max(len(unescaped), len(unicodedata.normalize("NFC", unescaped)))


@settings(max_examples=200, deadline=None)
@given(raws=st.lists(texts, max_size=6))
def test_each_raw_text_has_one_outcome(raws: list[str], language: Language) -> None:
    cleaned = clean_all(raws, CONFIG, language)
    assert len(cleaned) == len(raws)
    kept = [c for c in cleaned if c.reason is None]
    assert len({c.text.casefold() for c in kept}) == len(kept)
    for raw, c in zip(raws, cleaned, strict=True):
        assert (c.text, c.reason) == clean_text(raw, CONFIG) or c.reason is Reason.DUPLICATE
        assert c.language is None or (c.text and len(c.language) == 2)


HOSTILE_PIECES = (
    "<a ", "<a b='", '<a b="c" ', "<!--", "<![", "</", "&amp;", "&amp;lt;", "{{", "[caption ", "(",
    "(image)", "stock photo ", "| ", "cat, ", "a.", "a-", "http://", "1,", "$1", "100x100 ", "_",
    "hd 4k ", "🔥", "\u200d", "Ã", "a\u0301", "壁纸", "\x00", " ",
)  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE_PIECES)
def test_a_hostile_megabyte_takes_no_longer_than_its_first_page(
    piece: str, language: Language
) -> None:
    megabyte = piece * (1_000_000 // len(piece))
    began = time.process_time()
    for end in ("", ">", "x"):
        clean_all([megabyte + end, megabyte[: CONFIG.max_chars - 1] + end], CONFIG, language)
    assert time.process_time() - began < 2  # seconds for six texts; they take about 0.1


# --- language ------------------------------------------------------------------------------------

CAPTIONS = """
ar: منظر الميناء من القلعة / كعكة شوكولاتة بالفراولة / حارس المرمى يمسك الكرة / كلب نائم تحت شجرة
    خريطة شبكة السكك الحديدية / العروسان يغادران الكنيسة / أكواب خزفية مرسومة يدويا
    شارع ممطر في الليل
cs: pohled na přístav z hradu / čokoládový dort s jahodami / brankář chytá míč
    pes spící pod stromem / mapa železniční sítě / novomanželé vycházejí z kostela
    ručně malované keramické hrnky / deštivá ulice v noci
de: Blick von der Burg auf den Hafen / Schokoladenkuchen mit Erdbeeren
    der Torwart fängt den Ball / Hund schläft unter einem Baum / Karte des Eisenbahnnetzes
    Brautpaar verlässt die Kirche / handbemalte Keramiktassen / regnerische Straße bei Nacht
el: θέα στο λιμάνι από το κάστρο / κέικ σοκολάτας με φράουλες / ο τερματοφύλακας πιάνει την μπάλα
    σκύλος κοιμάται κάτω από δέντρο / χάρτης του σιδηροδρομικού δικτύου
    το ζευγάρι βγαίνει από την εκκλησία / ζωγραφισμένες κεραμικές κούπες / βροχερός δρόμος τη νύχτα
en: view of the harbour from the castle / chocolate cake with strawberries
    the goalkeeper catches the ball / dog sleeping under a tree / map of the railway network
    bride and groom leaving the church / hand-painted ceramic mugs / rainy street at night
es: vista del puerto desde el castillo / tarta de chocolate con fresas
    el portero atrapa el balón / perro durmiendo bajo un árbol / mapa de la red ferroviaria
    los novios salen de la iglesia / tazas de cerámica pintadas a mano / calle lluviosa de noche
fa: نمای بندر از قلعه / کیک شکلاتی با توت فرنگی / دروازه‌بان توپ را می‌گیرد
    سگی زیر درخت خوابیده است / نقشه شبکه راه آهن / عروس و داماد از کلیسا خارج می‌شوند
    لیوان‌های سرامیکی نقاشی شده / خیابان بارانی در شب
fr: vue du port depuis le château / gâteau au chocolat et aux fraises
    le gardien attrape le ballon / chien endormi sous un arbre / carte du réseau ferroviaire
    les mariés sortent de l'église / tasses en céramique peintes à la main / rue pluvieuse la nuit
he: נוף הנמל מהטירה / עוגת שוקולד עם תותים / השוער תופס את הכדור / כלב ישן מתחת לעץ
    מפת רשת הרכבות / החתן והכלה יוצאים מהכנסייה / ספלי קרמיקה בציור יד / רחוב גשום בלילה
hi: किले से बंदरगाह का दृश्य / स्ट्रॉबेरी के साथ चॉकलेट केक / गोलकीपर गेंद पकड़ता है / पेड़ के नीचे सोता हुआ कुत्ता
    रेलवे नेटवर्क का नक्शा / दूल्हा और दुल्हन मंदिर से निकलते हुए / हाथ से बने मिट्टी के बर्तन / रात में बारिश वाली सड़क
id: pemandangan pelabuhan dari kastil / kue cokelat dengan stroberi
    penjaga gawang menangkap bola / anjing tidur di bawah pohon / peta jaringan kereta api
    pengantin keluar dari gereja / cangkir keramik lukisan tangan / jalan hujan di malam hari
it: vista del porto dal castello / torta al cioccolato con fragole
    il portiere afferra il pallone / cane che dorme sotto un albero / mappa della rete ferroviaria
    gli sposi escono dalla chiesa / tazze di ceramica dipinte a mano / strada piovosa di notte
ja: 城から見た港の眺め / いちごのチョコレートケーキ / ボールをつかむゴールキーパー
    木の下で眠る犬 / 鉄道路線図 / 教会を出る新郎新婦 / 手描きの陶器のマグカップ / 夜の雨の通り
ko: 성에서 바라본 항구 풍경 / 딸기를 얹은 초콜릿 케이크 / 공을 잡는 골키퍼 / 나무 아래에서 자는 개
    철도 노선도 / 교회를 나서는 신랑 신부 / 손으로 그린 도자기 머그잔 / 비 오는 밤거리
nl: uitzicht op de haven vanaf het kasteel / chocoladetaart met aardbeien / de keeper vangt de bal
    hond slaapt onder een boom / kaart van het spoorwegnet / bruidspaar verlaat de kerk
    handbeschilderde keramische mokken / regenachtige straat in de nacht
pl: widok na port z zamku / ciasto czekoladowe z truskawkami / bramkarz łapie piłkę
    pies śpiący pod drzewem / mapa sieci kolejowej / para młoda wychodzi z kościoła
    ręcznie malowane kubki ceramiczne / deszczowa ulica nocą
pt: vista do porto a partir do castelo / bolo de chocolate com morangos / o goleiro agarra a bola
    cachorro dormindo debaixo de uma árvore / mapa da rede ferroviária / os noivos saindo da igreja
    canecas de cerâmica pintadas à mão / rua chuvosa à noite
ru: вид на гавань из замка / шоколадный торт с клубникой / вратарь ловит мяч
    собака спит под деревом / карта железных дорог / жених и невеста выходят из церкви
    расписанные вручную керамические кружки / дождливая улица ночью
sv: utsikt över hamnen från slottet / chokladtårta med jordgubbar / målvakten fångar bollen
    hund som sover under ett träd / karta över järnvägsnätet / brudparet lämnar kyrkan
    handmålade keramikmuggar / regnig gata på natten
th: วิวท่าเรือจากปราสาท / เค้กช็อกโกแลตกับสตรอว์เบอร์รี / ผู้รักษาประตูรับลูกบอล / สุนัขนอนหลับใต้ต้นไม้
    แผนที่เครือข่ายรถไฟ / เจ้าบ่าวเจ้าสาวเดินออกจากโบสถ์ / แก้วเซรามิกวาดด้วยมือ / ถนนฝนตกยามค่ำคืน
tr: kaleden limanın görünümü / çilekli çikolatalı pasta / kaleci topu yakalıyor
    ağacın altında uyuyan köpek / demiryolu ağı haritası / gelin ve damat kiliseden çıkıyor
    el boyaması seramik kupalar / gece yağmurlu sokak
uk: вид на гавань із замку / шоколадний торт з полуницею / воротар ловить м'яч
    собака спить під деревом / карта залізниць / наречені виходять із церкви
    керамічні чашки ручного розпису / дощова вулиця вночі
vi: toàn cảnh bến cảng nhìn từ lâu đài / bánh sô cô la với dâu tây / thủ môn bắt bóng
    con chó ngủ dưới gốc cây / bản đồ mạng lưới đường sắt / cô dâu chú rể rời nhà thờ
    cốc gốm vẽ tay / đường phố mưa về đêm
zh: 从城堡看港口的景色 / 草莓巧克力蛋糕 / 守门员接住球 / 在树下睡觉的狗 / 铁路网地图
    新郎新娘走出教堂 / 手绘陶瓷杯子 / 夜晚下雨的街道
"""  # fmt: skip
NAMES = (
    "Nike Air Max 97", "Mario Rossi", "Toyota Corolla 2015", "Taj Mahal", "New York", "Coca-Cola",
    "Samsung Galaxy S21 Ultra", "Leonardo da Vinci", "Hotel Bristol Wien", "AC/DC Back in Black",
)  # fmt: skip


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(CONFIG.min_language_confidence)


def test_languages_of_short_captions(language: Language) -> None:
    found = []
    for block in re.split(r"\n(?=\w\w: )", CAPTIONS.strip()):
        right, texts = block.split(": ", 1)
        found += [(right, language(text.strip())) for text in re.split(" / |\n", texts)]
    assert len(found) == 24 * 8
    assert sum(right == code for right, code in found) >= 170
    assert sum(code not in (right, None) for right, code in found) <= 6
    assert {right for right, code in found if code == right} == {right for right, _ in found}


def test_a_name_has_no_language_and_shouting_has_one(language: Language) -> None:
    assert [language(name) for name in NAMES] == [None] * len(NAMES)
    assert language("DIE FEUERWEHR LÖSCHT DEN BRAND AM HAFEN") == "de"


# --- the stage -----------------------------------------------------------------------------------

RAW: list[list[str]] = [
    ["Two children feed ducks at the pond | Shutterstock", "DSC_0123.JPG"],
    [],
    [
        "Старая кошка спит на широком подоконнике",
        "<b>старая кошка спит на широком подоконнике!</b>",
        "image",
    ],
    ["&nbsp;"],
    [
        "夕焼けの港",
        "https://example.com/",
        "cheap shoes, buy shoes, shoes online, best shoes, shoes sale",
    ],
    ["ok", "🔥🔥"],
]


def test_the_stage_gives_each_text_its_outcome_in_order(tmp_path: Path) -> None:
    run_toy(tmp_path, range(1), toy_steps()[:1])
    dataset = Dataset.open(tmp_path)
    samples = dataset.read_table("samples", 0)[0]
    at = samples.schema.get_field_index("alt_texts")
    samples = samples.set_column(at, samples.schema.field(at), [RAW])
    stage: AltText = pickle.loads(pickle.dumps(AltText(CONFIG)))  # noqa: S301  as a worker gets it
    table = stage.open()(ShardBlock(dataset, 0, {"samples": samples}, ShardImages(dataset, 0)))
    assert table["key"].to_pylist() == samples["key"].to_pylist()
    assert set(table["status"].to_pylist()) == {"ok"}
    cells: list[list[dict[str, Any]]] = table["alt_texts"].to_pylist()
    assert cells == [
        [
            {"text": "Two children feed ducks at the pond", "reason": None, "language": "en"},
            {"text": "", "reason": "file_name", "language": None},
        ],
        [],
        [
            {"text": "Старая кошка спит на широком подоконнике", "reason": None, "language": "ru"},
            {"text": "", "reason": "duplicate", "language": None},
            {"text": "", "reason": "boilerplate", "language": None},
        ],
        [{"text": "", "reason": "html_only", "language": None}],
        [
            {"text": "夕焼けの港", "reason": None, "language": "ja"},
            {"text": "", "reason": "url", "language": None},
            {"text": "", "reason": "keyword_spam", "language": None},
        ],
        [
            {"text": "", "reason": "too_short", "language": None},
            {"text": "", "reason": "no_letters", "language": None},
        ],
    ]


def test_what_goes_into_its_lineage() -> None:
    stage = AltText(AltTextConfig(min_chars=5))
    assert (stage.name, stage.reads) == ("alt_texts", ())
    assert stage.settings() == {**AltText(CONFIG).settings(), "min_chars": 5}
    others = AltTextConfig.model_fields.keys() - stage.settings().keys()
    assert others == {"min_relevance"}  # of the stage that reads this one's table
    assert stage.revision().startswith("sha256:")
    with pytest.raises(ValidationError, match="min_char\n"):
        AltTextConfig(min_char=5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("raw", "settings_", "reason"),
    [
        ("前", {"min_chars": 2}, None),
        ("fog", {"min_chars": 4}, Reason.TOO_SHORT),
        ("sea, sand, gull", {"list_items": 3, "max_list_items": 2}, Reason.KEYWORD_SPAM),
        ("a cat, a cat on mat, a cat nap", {"list_items": 3}, Reason.KEYWORD_SPAM),
        ("a cat, a cat on mat, a cat nap", {"list_items": 3, "max_list_repeats": 0.9}, None),
        ("cat cat cat dog cat cat", {"max_repeats": 0.9}, None),
        ("cat cat cat dog cat cat", {}, Reason.KEYWORD_SPAM),
    ],
)
def test_each_setting_can_be_moved(
    raw: str, settings_: dict[str, Any], reason: Reason | None
) -> None:
    assert clean_text(raw, AltTextConfig(**settings_))[1] == reason


def test_only_the_first_characters_are_read() -> None:
    assert clean_text("gull " + "x" * 50, AltTextConfig(max_chars=16)) == ("gull " + "x" * 11, None)


def test_the_document_has_each_reason_and_each_setting_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "alt-text.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \| `", page, re.M) == [
        reason.value for reason in Reason
    ]
    told: dict[str, str] = {}
    for names, defaults in re.findall(r"^\| (`[a-z_`, ]+`) \| ([\d., ]+) \|", page, re.M):
        told |= zip(re.findall(r"\w+", names), defaults.split(", "), strict=True)
    assert told == {name: str(value) for name, value in CONFIG.model_dump().items()}
