"""Lines of text by script (ISO 15924), as they stand on signs, packages, slides and pages.

Tests draw characters one after the other, from left to right, as every machine can. So lines that
run from right to left are turned around here, and Arabic letters take their joined forms.
"""

import re
import unicodedata


def _listed(text: str) -> list[str]:
    return text.strip().replace("\n", "|").split("|")


LATIN = _listed("""
Open daily from nine to six|Museum entrance tickets|Quarterly revenue increased 37.5%
Mind the step|Please keep off the grass|Annual report 2023|Harbour Bridge is closed
SUMMER SALE|NO SMOKING|Emergency exit|Fresh bread and coffee|Visitors must register here
Figure 4: Energy per capita|Terms and conditions apply|Next bus in 12 minutes
Made with organic oats|Keep refrigerated|Exit 24B to Riverside Drive|www.example.org/tickets
Call +44 20 7946 0018|$19.99 each|Doors open at 8 pm|Platform 3|Speed limit 50 km/h|ROOM 217
Best before 14.08.2025|Entrée interdite aux chiens|Café crème et croissants
Prochain arrêt: Hôtel de Ville|Défense de fumer|Öffnungszeiten: Montag bis Freitag
Bitte nicht stören|Frische Brötchen täglich|Größe: 42|Salida de emergencia
Se alquila habitación|Mañana cerrado por descanso|Piso 2, puerta izquierda|Wyjście ewakuacyjne
Zakaz wstępu|Świeże owoce i warzywa|Hurtownia części zamiennych|Uscita di sicurezza
Gelato artigianale|Vietato fumare|Prezzo al chilo: 3,40 €|Giriş ücretsizdir|Çay ve kahve
Dikkat: kaygan zemin|Günlük taze balık|Åpningstider|Stängt på grund av sjukdom
Væsgo, ta en kopp|Ajándékbolt|Příští zastávka
""")

CHINESE = _listed("""
欢迎光临|今日特价|营业时间|上午九点至下午六点|请勿吸烟|小心地滑|紧急出口|北京大学图书馆
春季新品发布会|全场五折起|中国人民银行|自动售票机|前方学校减速慢行|会议日程安排
第一季度销售额增长|数据来源统计局|人工智能与未来社会|请在此处排队等候|免费无线网络|咖啡与甜点
牛肉面十八元|保护环境人人有责|地铁二号线换乘|火车站候车室|机场快线时刻表|博物馆周一闭馆
儿童票半价|开放时间以公告为准|图书借阅须知|水果蔬菜批发市场|海鲜大排档|手机维修中心|严禁烟火
请系好安全带|高速公路收费站|限速六十公里|山水之间的古镇|历史文化名城|茶叶专卖店|红烧排骨套餐
学生宿舍楼|网上预约挂号|药品说明书|每日两次饭后服用|新鲜牛奶保质期7天|产地四川成都|净含量500克
客服电话400-820-8820|扫码关注公众号|2024年度财务报告|项目进度计划|风景区游览图|距离终点3公里
天气预报多云转晴|气温23度|快递有限公司|建设美丽乡村|体育馆入口|世界杯决赛直播|音乐节门票
摄影作品展|老北京炸酱面|请保持安静|歡迎光臨|營業時間|國際機場|臺北車站|圖書館開放|注意安全
夜市小吃|觀光巴士
""")

JAPANESE = _listed("""
営業中|いらっしゃいませ|本日のおすすめ|駐車禁止|非常口|お手洗いはこちら|ラーメン八百円
コーヒーとケーキ|ありがとうございました|東京駅まで三十分|ご自由にお取りください|カラオケ
クリーニング店|夏のセール開催中
""")

CYRILLIC = _listed("""
Добро пожаловать|ВЫХОД|Осторожно, двери закрываются|Свежий хлеб каждый день|Аптека
Режим работы|Ресторан|Вход воспрещён|Продажа билетов|Годовой отчёт за 2023 год
Московский вокзал|Скидки до 50%|Не курить|Книжный магазин|Библиотека имени Ленина|Ремонт обуви
Молоко и сметана|Цветы|ОБМЕН ВАЛЮТЫ|Парковка платная|Щука по-польски|Київ|Зачинено на обід
Ласкаво просимо|Изложба на картини|Добре дошли|Продавница
""")

GREEK = _listed("""
Καλώς ήρθατε|ΕΞΟΔΟΣ|Φαρμακείο|Ανοιχτά κάθε μέρα|Απαγορεύεται το κάπνισμα|Εισιτήρια|Βιβλιοθήκη
Φρέσκο ψωμί|Προσοχή στο κενό|Λεωφόρος Συγγρού|Ψαροταβέρνα|Ξενοδοχείο|Δημόσιο σχολείο|ΘΕΑΤΡΟ
""")

HANGUL = _listed("""
환영합니다|영업시간|오전 아홉시부터|금연|비상구|서울역|화장실|오늘의 특가|어린이 보호구역
주차금지|신선한 우유|도서관|버스 정류장|할인 행사|감사합니다|출입금지|커피와 케이크
맛있는 김치찌개|무료 와이파이|매주 월요일 휴관
""")

HEBREW = _listed("""
ברוכים הבאים|יציאה|שעות פתיחה|אין כניסה|בית מרקחת|לחם טרי|תחנה מרכזית|ספרייה עירונית|אסור לעשן
רחוב הרצל|מבצע סוף עונה|מוזיאון ישראל|בית ספר|תודה רבה|חניה|קפה ומאפה|שירותים
""")

ARABIC = _listed("""
أهلا وسهلا|مخرج|ساعات العمل|ممنوع التدخين|صيدلية|خبز طازج|محطة القطار|مكتبة عامة|مطعم|مدرسة
شارع الملك|مستشفى|تخفيضات كبيرة|شكرا لكم|موقف سيارات|قهوة وشاي|المتحف الوطني|ممنوع الدخول
""")

THAI = _listed("""
ยินดีต้อนรับ|ทางออก|เวลาทำการ|ห้ามสูบบุหรี่|ร้านอาหาร|สถานีรถไฟ|โรงพยาบาล|ลดราคา|กาแฟและขนม
ห้องน้ำ|ตลาดนัด|ขอบคุณ|ห้ามจอดรถ|ผลไม้สด|ธนาคาร|ประชาสัมพันธ์|ห้องสมุด
""")

DEVANAGARI = _listed("""
भारत सरकार|बाजार|समाचार|नगर पालक|चाय और पानी|खाना घर|रेलगाड़ी|महाराज|राजधानी|सड़क पर रोक
दूध दही|सावधान|आज का भाव|पाठशाला|मेला|गाना बजाना|जल ही जीवन|शहर का नाम|हवाई जहाज|डाकघर
""")


def _forms() -> dict[tuple[str, str], str]:
    """Arabic presentation forms by letters (two for a ligature) and position in the word."""
    found = {}
    for code in range(0xFE80, 0xFEFD):
        position, *letters = unicodedata.decomposition(chr(code)).split()
        found["".join(chr(int(letter, 16)) for letter in letters), position] = chr(code)
    return found


def _joined(word: str) -> str:
    """An Arabic word in the forms that its letters take beside one another."""
    forms = _forms()
    units = re.findall("ل[اأإآ]|.", word)
    joins_next = [(unit, "<initial>") in forms for unit in units]
    shown = ""
    for place, unit in enumerate(units):
        before = place > 0 and joins_next[place - 1]
        after = joins_next[place] and place + 1 < len(units)
        position = ("isolated", "initial", "final", "medial")[2 * before + after]
        shown += forms.get((unit, f"<{position}>"), unit)
    return shown


VISIBLE: dict[str, list[str]] = {
    "Latn": LATIN,
    "Hani": CHINESE,
    "Jpan": JAPANESE,
    "Cyrl": CYRILLIC,
    "Grek": GREEK,
    "Hang": HANGUL,
    "Hebr": [line[::-1] for line in HEBREW],
    "Arab": [" ".join(map(_joined, line.split()))[::-1] for line in ARABIC],
    "Thai": THAI,
    "Deva": DEVANAGARI,
}
"""By script; Jpan is kana and characters mixed."""
