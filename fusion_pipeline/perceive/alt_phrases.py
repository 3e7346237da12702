"""Words and phrases of web pages that say nothing of an image, in the languages the web is in.

A change here changes what becomes of texts: raise `AltText.version`.
"""

import re

# Not \w: it has no combining marks, without which Hindi and Thai fall to pieces.
WORD = re.compile(
    r"[^\s!-/:-@\[-`{-~¡¿«»‹›“”„‘’‚…·•†‡–—―‐¦×（）［］｛｝【】〈〉《》「」『』〔〕、。，．：；！？｜・～]+"
)
Phrases = frozenset[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _phrases(table: str) -> Phrases:
    """Phrases of a table: one between semicolons or lines, `#` opens a comment."""
    lines = (line.split("#")[0] for line in table.splitlines())
    return frozenset(
        tuple(words_of(phrase)) for line in lines for phrase in line.split(";") if phrase.strip()
    )


EDGES = _phrases("""
    # Cut off from the start and the end of a text or of a part of it, whatever is beside them.
    stock photo; stock photos; stock image; stock images; stock picture; stock photography
    stock photo of; stock image of; stock vector; stock illustration; stock footage; vector stock
    royalty free; royalty free stock photo; royalty free stock photo of; royalty free image
    royalty free images; royalty free stock image; royalty free photo; royalty free vector
    royalty free stock photography; royalty free stock images; royalty free stock photos
    stockfoto; stockfotos; stockfotografie; stockbild; stockvektor; lizenzfreies bild
    lizenzfreie bilder; lizenzfreies stockfoto; lizenzfreie stockfotos; rechtenvrije foto
    photo libre de droits; image libre de droits; photos libres de droits; photo de stock
    foto de stock; fotos de stock; imagen de stock; foto libre de derechos; imagem de stock
    foto stock; foto gratis; immagine stock; immagini stock; zdjęcie stockowe; stok fotoğraf
    стоковое фото; стоковые фото; стоковая фотография; стокове фото; 写真素材; ストックフォト
    フリー素材; 图片素材; 高清图片; 스톡 사진; click to enlarge; click to zoom; click to view
    click to expand; click for larger image; click for larger view; click for full size
    click to view larger image; click image to enlarge; click on image to enlarge
    click to enlarge image; click to enlarge picture; tap to zoom; roll over image to zoom in
    hover to zoom; view larger; view larger image; view full size; zum vergrößern klicken
    zum vergrößern anklicken; klicken zum vergrößern; bild vergrößern; zum vergrößern hier klicken
    cliquez pour agrandir; cliquer pour agrandir; agrandir l'image; haz clic para ampliar
    haga clic para ampliar; clic para ampliar; ampliar imagen; clique para ampliar
    clique para aumentar; ampliar imagem; clicca per ingrandire; ingrandisci immagine
    klik om te vergroten; klik voor vergroting; klicka för att förstora; kliknij aby powiększyć
    powiększ zdjęcie; klikněte pro zvětšení; kattintson a nagyításhoz; нажмите чтобы увеличить
    нажмите для увеличения; увеличить изображение; увеличить фото; натисніть щоб збільшити
    збільшити зображення; büyütmek için tıklayın; klik untuk memperbesar; nhấn để phóng to
    bấm để phóng to; اضغط للتكبير; اضغط لتكبير الصورة; クリックで拡大; 画像を拡大
    クリックすると拡大します; 拡大画像; 点击放大; 点击查看大图; 點擊放大; 클릭하면 확대
    이미지 확대; image result for; image results for; bildergebnis für; bildergebnisse für
    résultat de recherche d'images pour; résultats de recherche d'images pour
    resultado de imagen para; resultado de imagen de; resultado de imagem para
    risultati immagini per; risultato immagine per; afbeeldingsresultaat voor; bildresultat för
    znalezione obrazy dla zapytania; výsledek obrázku pro; картинки по запросу
    результат пошуку зображень; için resim sonucu; hasil gambar untuk; kết quả hình ảnh cho
    نتيجة بحث الصور عن; の画像検索結果; 的图片搜索结果; 的圖片搜尋結果; 에 대한 이미지 검색결과
    free shipping; free delivery; buy now; buy online; shop now; order now; order today
    add to cart; add to basket; add to bag; add to wishlist; best price; best prices
    at best price; at the best price; online at best price; online at best prices; best seller
    left in stock; out of stock; sold out; special offer; limited offer; money back guarantee
    gift ideas; free download; may be an image of; image may contain; embedded image permalink
    profile photo; profile picture; lazy load; kostenloser versand; versandkostenfrei
    jetzt kaufen; in den warenkorb; online kaufen; livraison gratuite; ajouter au panier
    acheter en ligne; envío gratis; añadir al carrito; comprar online; frete grátis
    adicionar ao carrinho; spedizione gratuita; aggiungi al carrello; gratis verzending
    in winkelwagen; darmowa dostawa; бесплатная доставка; купить в интернет магазине
    безкоштовна доставка; ücretsiz kargo; sepete ekle; gratis ongkir; miễn phí vận chuyển
    شحن مجاني; 送料無料; 送料込み; 包邮; 免運費; 무료배송
""")
LABELS = EDGES | _phrases("""
    # Nothing is said by a text, or a part of it, that has only these.
    image; images; img; photo; photos; photograph; pic; pics; picture; pictures; foto; fotos; bild
    bilder; imagen; imágenes; imagem; imagens; immagine; immagini; afbeelding; afbeeldingen; obraz
    zdjęcie; zdjęcia; obrázek; kép; fénykép; kuva; billede; bilde; фото; фотография; изображение
    картинка; зображення; світлина; слика; снимка; εικόνα; φωτογραφία; resim; fotoğraf; görsel
    gambar; hình ảnh; ảnh; صورة; صور; عکس; تصویر; תמונה; चित्र; फोटो; तस्वीर; รูปภาพ; ภาพ; รูป; 画像
    写真; イメージ; 图片; 圖片; 图像; 照片; 사진; 이미지; main image; product image; product photo
    image of product; produktbild; produktfoto; image du produit; photo du produit
    imagen de producto; imagen del producto; foto do produto; imagem do produto
    immagine del prodotto; zdjęcie produktu; фото товара; изображение товара; 商品画像; 产品图片
    商品图片; 상품 이미지; no image; no photo; image not found; no image available
    image not available; related image; image coming soon; no photo description available
    photo coming soon; profile image; user avatar; profilbild; фото профиля; foto de perfil
    bild nicht gefunden; kein bild; kein bild verfügbar; pas d'image; sin imagen; sem imagem
    nessuna immagine; brak zdjęcia; нет фото; нет изображения; 画像なし; 暂无图片; 이미지 없음
    untitled; ohne titel; sans titre; sin título; sem título; senza titolo; без названия
    placeholder; default; undefined; null; nan; none; object object; todo; tbd; alt text
    insert alt text here; image description; image alt; alt; title; thumbnail; thumb; thumbnails
    logo; icon; button; banner; header; footer; hero; slide; slider; slideshow; carousel; gallery
    galerie; galería; galeria; галерея; bg; background; backgrounds; hintergrund; spacer; blank
    pixel; avatar; cover; featured; screenshot; screen shot; bildschirmfoto; capture d'écran
    captura de pantalla; captura de tela; zrzut ekranu; снимок экрана; скриншот
    スクリーンショット; 屏幕截图; dsc; dscn; dscf; pxl; mvimg; cimg; scan; wallpaper; wallpapers
    обои; 壁紙; 壁纸; hd; uhd; 4k; 8k; 2k; 5k; full hd; ultra hd; fhd; qhd; 1080p; 720p; hq
    high quality; high resolution; hi res; desktop; free; download; downloads; vector; vectors
    clipart; clip art; svg; png; eps; jpg; jpeg; gif; webp; psd; pdf; printable; template
    templates; mockup; pcs; px; cheap; best; top; deal; deals; hot deal; coupon; coupons; sale
    on sale; for sale; discount; discounts; offer; offers; price; prices; buy; shop; shopping
    store; online; online shop; online store; order; only; off; from; near me; review; reviews
    rating; likes; like; share; subscribe; follow; follow us; read more; learn more; see more
    show more; more; view; details; view details; click; click here; here; next; previous; prev
    back; close; menu; search; loading; please wait; kaufen; preis; angebot; shop online; acheter
    prix; promo; promotion; comprar; precio; oferta; preço; prezzo; offerta; acquista; kopen
    aanbieding; cena; купить; цена; скидка; акция; купити; ціна; satın al; fiyat; indirim; beli
    harga; mua; giá; в корзину; do koszyka; شراء; سعر; 価格; 通販; 购买; 价格; 구매; 가격
""")
SITES = _phrases("""
    # A part of a text that is such a name, with a country or a domain's end or without.
    shutterstock; istock; istockphoto; getty images; gettyimages; alamy; dreamstime; depositphotos
    123rf; adobe stock; fotolia; bigstock; bigstockphoto; canstock; can stock photo; vecteezy
    freepik; pixabay; unsplash; pexels; pixta; stocksy; envato; envato elements; creative market
    wallpaper flare; wallpaper cave; wallpaper abyss; etsy; ebay; aliexpress; alibaba; walmart
    wayfair; overstock; flipkart; poshmark; zazzle; redbubble; society6; teepublic; cafepress
    spreadshirt; zalando; mercado libre; mercado livre; rakuten; taobao; tmall; shopee; lazada
    wildberries; leboncoin; cdiscount; kaufland; trendyol; hepsiburada; coupang; pinterest; flickr
    facebook; instagram; twitter; tumblr; reddit; youtube; tiktok; weibo; linkedin; imgur
    deviantart; artstation; behance; dribbble; 500px; smugmug; photobucket; wikipedia; wikimedia
    wikimedia commons; imdb; tripadvisor; airbnb; zillow; realtor; houzz; yelp; 楽天市場; 楽天
    メルカリ; ヤフオク; 淘宝; 京东; 天猫; 百度; 쿠팡; 네이버; википедия; ウィキペディア; 维基百科
""")
AFTER_SITE = _set("""
    uk us usa ca canada au australia india in ireland ie nz deutschland de fr france es españa it
    italia nl nederland be pl polska br brasil mx méxico jp japan 日本 cn 中国 kr 한국 ru россия
    tr türkiye com net org co
""")
BEFORE_SITE = _set("copyright www on at by from via")
FILE_WORDS = _set("""
    final copy copia copie kopie edit edited new neu small large medium mini big web full crop
    cropped resized scaled optimized compressed whatsapp telegram camera imag file page design the
    and von for with untitled version rev temp test sample media uploads upload content asset
""")
NOISE = _set("""
    hd uhd fhd qhd 2k 4k 5k 8k 1080p 720p hq fullhd wallpaper wallpapers background backgrounds
    desktop free download full ultra px
""")
LOUD_NOISE = NOISE - _set("wallpaper wallpapers background backgrounds desktop free download")

# Elements of HTML; another `<name>` is a text's own. Those that run inside a line leave no gap.
INLINE = _set("""
    a abbr acronym b bdi bdo big cite code del dfn em font i ins kbd mark nobr q s samp small span
    strike strong sub sup tt u var wbr
""")
ELEMENTS = INLINE | _set("""
    address area article aside audio base blockquote body br button canvas caption center col
    colgroup data datalist dd details dialog dir div dl dt embed fieldset figcaption figure footer
    form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html iframe img input label legend
    li link main map marquee menu meta meter nav noframes noscript object ol optgroup option
    output p param path picture pre progress rp rt ruby script search section select slot source
    style summary svg table tbody td template textarea tfoot th thead time title tr track ul video
""")
