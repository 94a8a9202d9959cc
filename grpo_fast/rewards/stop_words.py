"""Frequent words, and letters, by which languages of one script are told apart.

Per language: function words, and words that reasoning is full of. A word of two languages stands with both; single
letters do not count. Letters are those outside of the script's common ones (ASCII for Latin).
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STOP_WORDS: Final[dict[str, frozenset[str]]] = {
    "en": _words(
        "the of and to in is that it for as was with be by on not he his but at are this have from or had an they which"
        " one you were all her she there would their we him been has when who will no if out so what up its about into"
        " than them can only other new some could time these two may then do first any my now such like our over man me"
        " even most made after also did many must before back see through way where get much go well your know should"
        " down because each just those people how too use used using here more let us need needs want since thus hence"
        " therefore both give given means equal equals answer check wait okay ok hmm yes think thinking try next"
        " finally second same very find compute calculate solve step steps right wrong actually maybe again"
        " number another die war hat art gut bald per pour don't doesn't isn't can't that's it's"
        " prove show determine evaluate simplify let's i'm we'll we're i'll you're what's"
        " how's has have having does done being while whose why"
    ),
    "de": _words(
        "löse lösen zeige gegeben wieviel welche welcher welches "
        "der die das und ist von den des nicht mit sich auf für ein eine einen einem einer eines dem es als auch an er"
        " wir ich sie so dass daß im in zu sind war wird werden haben hat bei wie nach aus oder noch nur kann können"
        " wenn aber um man also dann da zum zur durch über unter diese dieser dieses diesem diesen jetzt muss müssen"
        " was sein vom am bis vor weil zwischen gegen ohne zuerst somit daher deshalb folgt gilt gibt ergibt lösung"
        " antwort gleich zwei drei zahl zahlen zuerst schritt berechne berechnen bestimme finde sei wäre würde mal"
        " alle allen jeder jede keine kein ihr uns mich dir mir hier dort warte moment ja nein denn doch etwa sowie"
        " insgesamt erste zweite nächste schließlich einfach will"
    ),
    "fr": _words(
        "trouvez trouve calculez calcule résoudre résous résolvez montrer montrez déterminer déterminez soient quelles "
        "le la les de des du un une et est en que qui dans pour pas sur au aux avec ce cette ces il elle nous vous on"
        " ne se son sa ses sont être avoir ont par plus ou mais si donc alors car comme tout tous fait faut leur où"
        " c'est d'abord l'on j'ai qu'il n'est je tu lui y a-t ainsi puis ensuite après avant deux trois réponse nombre"
        " soit égal calculer calculons trouver avons puisque parce peut peux doit dois deux même aussi très bien"
        " attends voyons étape enfin première premier autre autres cela ça quand quel quelle combien chaque sans entre"
        " me pour mon les d'une d'un l'équation s'il était"
    ),
    "es": _words(
        "encuentra encuentre calcula calcule halla resuelve resolver determina demuestra cuáles sean "
        "el la los las de del un una y es en que por para con no se su sus lo al como más pero si ya o este esta estos"
        " estas esto eso ese esa son está están ser hay fue era tiene tenemos muy también entonces porque cuando donde"
        " sobre entre sin hasta desde todo todos nos le les me mi tu dos tres respuesta número números primero luego"
        " después así ahora paso igual solución calcular calculamos encontrar vamos debemos podemos puede cada otro"
        " otra cuál cuántos cuánto ecuación espera sea finalmente bien aquí hemos"
    ),
    "it": _words(
        "trova calcola risolvi risolvere determina dimostra quale quali quanti quanto siano "
        "il lo la gli le di del della dei delle dello un una uno e è in che per con non si su come più ma se da dal"
        " dalla al alla ai nel nella sono essere ha hanno abbiamo anche questo questa questi queste quello quella cui"
        " quindi allora perché quando dove poi prima dopo tra fra ogni tutto tutti ci ne io noi loro sua suo due tre"
        " risposta numero numeri passo uguale soluzione calcolare calcoliamo trovare dobbiamo possiamo può deve così"
        " adesso ora infine aspetta sia sul sulla cioè ovvero"
    ),
    "pt": _words(
        "encontre calcule resolva resolver determine prove quais sejam "
        "o os as de do da dos das um uma e é em que por para com não se seu sua seus suas no na nos nas ao à como mais"
        " mas ou já este esta isto isso esse essa são está estão ser há foi era tem temos muito também então porque"
        " quando onde sobre entre sem até desde todo todos me nós eu ele ela dois duas três resposta número números"
        " primeiro depois assim agora passo igual solução calcular calculamos encontrar vamos devemos podemos pode"
        " cada outro outra qual quantos quanto equação espere seja finalmente bem aqui você pelo pela"
    ),
    "nl": _words(
        "bereken vind bepaal los welke hoeveel bewijs "
        "de het een en van is dat in te niet op aan met voor zijn er die ook als om naar dan maar we ik je hij zij ze"
        " wij hebben heeft had was werd wordt worden kan kunnen moet moeten zal zou bij uit over door tot dus want nog"
        " wel geen meer deze dit daar hier wat hoe waar wie omdat wanneer tussen eerst daarna vervolgens antwoord getal"
        " getallen stap gelijk twee drie of onze ons elke alle laten berekenen vinden eens nu"
    ),
    "sv": _words(
        "beräkna bestäm lös vilket vilka många "
        "och att det i en som är på av för med den till inte har om ett men vi jag de han hon kan ska skall så från"
        " när var vid eller också då nu där här vad hur alla detta denna dessa sedan först eftersom därför mellan"
        " utan över under mycket svar svaret tal talet steg lika två tre får måste låt oss beräkna hitta blir finns"
    ),
    "da": _words(
        "beregn bestem løs hvilket hvilke mange find "
        "og at det i en som er på af for med den til ikke har om et men vi jeg de han hun kan skal så fra når var ved"
        " eller også da nu der her hvad hvordan alle dette denne disse derefter først fordi derfor mellem uden over"
        " meget svar svaret tal tallet trin lig to tre får må lad os beregne finde bliver findes være hvis"
    ),
    "no": _words(
        "beregn bestem løs hvilket hvilke mange finn "
        "og at det i en som er på av for med den til ikke har om et men vi jeg de han hun kan skal så fra når var ved"
        " eller også da nå der her hva hvordan alle dette denne disse deretter først fordi derfor mellom uten over"
        " mye svar svaret tall tallet trinn lik to tre får må la oss beregne finne blir finnes være hvis"
    ),
    "pl": _words(
        "oblicz znajdź rozwiąż wyznacz ile jaka jaki jakie "
        "i w z na do nie to się że jest jak o a co po dla ale od za tak są przez czy już który która które gdy tylko"
        " jego jej ich ten ta te tego tej tym być był była było może można więc zatem ponieważ jeśli lub oraz mamy"
        " musimy możemy najpierw potem następnie teraz między bez nad pod przed każdy wszystkie dwa trzy odpowiedź"
        " liczba liczby krok równa równe obliczyć znaleźć niech czyli także"
    ),
    "tr": _words(
        "bul bulunuz hesapla hesaplayın çöz çözün kaç kaçtır nedir "
        "ve bir bu için ile de da ne var yok olarak çok daha gibi kadar sonra önce ama ancak veya ya ki mi mı mu mü o"
        " şu ben biz siz onlar olan olur oldu olduğu olduğunu ise eğer çünkü nasıl neden hangi her tüm iki üç cevap"
        " sayı sayısı adım eşit şimdi ilk önce bulmak bulalım hesaplayalım yani böylece dolayısıyla değil gerekir"
    ),
    "vi": _words(
        "hãy chứng minh giá trị "
        "và là của có không được cho các một những này trong với để khi người đã từ ra thì cũng như đó về đến ta chúng"
        " tôi nếu nên vì hay hoặc phải sẽ bằng số hai ba câu trả lời bước đầu tiên sau tính tìm giải vậy do mà bị nào"
        " bao nhiêu mỗi tổng phương trình ơi rồi đi lại"
    ),
    "id": _words(
        "tentukan hitunglah carilah selesaikan buktikan berapakah "
        "yang dan di ini itu dengan untuk dari pada dalam tidak adalah akan ke juga ada kita saya kami mereka dia oleh"
        " sebagai atau karena jika maka jadi sehingga bisa dapat harus sudah telah lebih setiap semua dua tiga jawaban"
        " bilangan angka langkah pertama kemudian selanjutnya sama hasil mari hitung cari nilai banyak berapa bahwa"
        " tetapi namun seperti antara tersebut"
    ),
    "ru": _words(
        "найдите вычислите решите докажите определите сколько какое какова каково чему "
        "и в не на что я с он а как это по но они мы все она так его за был от то же о из у к до вы бы если уже или"
        " ни быть для есть чтобы когда только можно нужно надо тогда значит поэтому потому где теперь сначала затем"
        " потом между без под над при через каждый все ответ число числа шаг равно равен найти найдем вычислим два три"
        " пусть следовательно этого этой этот эта эти их нас нам имеем получаем решение так даже ещё еще"
    ),
    "uk": _words(
        "знайдіть обчисліть розв'яжіть доведіть визначте скільки яке яка чому "
        "і в не на що я з він а як це по але вони ми всі вона так його за був від то ж про із у до ви якщо вже або ні"
        " бути для є щоб коли тільки можна потрібно треба тоді значить тому де тепер спочатку потім між без під над"
        " при через кожен відповідь число числа крок дорівнює знайти знайдемо обчислимо два три нехай отже цього цієї"
        " цей ця ці їх нас нам маємо отримуємо розв'язок також ще"
    ),
    "bg": _words(
        "намерете изчислете решете докажете определете колко коя кое "
        "и в не на че аз с той а как това по но те ние всички тя така го за беше от то е из у до вие ако вече или ни"
        " да се са съм бъде има когато само може трябва тогава значи защото къде сега първо след между без под над при"
        " през всеки отговор число числа числото стъпка равно намерим две три нека следователно този тази тези ще"
        " имаме получаваме решение също още който която което"
    ),
    "ar": _words(
        "أوجد احسب حل أثبت كم "
        "في من على إلى أن إن لا ما هذا هذه ذلك التي الذي كان كانت هو هي نحن لم لن قد كل بعد قبل عند ثم أو و إذا لأن"
        " بين مع عن حتى يجب يمكن لدينا الآن أولا العدد الجواب الإجابة الخطوة يساوي نحسب نجد اثنان ثلاثة هناك غير أي"
        " لذلك إذن يكون تكون كيف ماذا"
    ),
    "fa": _words(
        "بیابید چند مقدار ثابت حل "
        "در از به که این را با است برای آن یک می و تا بر هم یا اگر ما من او آنها باید شود شده بود هست نیست کند کنیم"
        " داریم پس چون زیرا اما ولی هر همه بین دو سه پاسخ جواب عدد مرحله برابر ابتدا سپس اکنون حالا بنابراین چگونه"
        " چه محاسبه پیدا کنید خواهد های ها"
    ),
    "ur": _words(
        "معلوم کریں حل کتنے کتنی "
        "کے کی کا میں ہے اور سے کو پر یہ ہیں کہ نے نہیں ایک وہ اس کر ہو تھا تھی ہم آپ بھی تو اگر یا جو جب لیے کیا گیا"
        " ہوں ہوتا ہوتی پہلے پھر اب بعد دو تین جواب عدد قدم برابر لہذا کیونکہ چاہیے سکتے ہر تمام درمیان"
    ),
}

LETTERS: Final[dict[str, str]] = {
    "de": "äöüß",
    "fr": "àâæçéèêëîïôœùûüÿ",
    "es": "áéíñóúü",
    "it": "àèéìòù",
    "pt": "áâãàçéêíóôõú",
    "nl": "éëïö",
    "sv": "åäöé",
    "da": "åæøé",
    "no": "åæøé",
    "pl": "ąćęłńóśźż",
    "tr": "çğıöşü",
    "vi": "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "ru": "ёъыэ",
    "uk": "ґєіїʼ",
    "bg": "ъ",
    "ar": "ةىكيأإ",
    "fa": "پچژگکی",
    "ur": "ٹڈڑںےپچژگکیہ",
}
