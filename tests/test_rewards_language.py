"""Language consistency: a table of texts, what counts as a word, and where the wanted language comes from."""

import pytest

from grpo_fast.rewards.language import LanguageConsistency
from grpo_fast.rewards.prose import prose_of
from grpo_fast.rewards.words import count_words, language_code, language_of

# (language, text, words of it, words)
COUNTS = [
    # one language alone
    ("en", "Let me think. We need to find the sum.", 9, 9),
    ("de", "Wir müssen die Summe finden. Also ist die Antwort fünf.", 10, 10),
    ("fr", "On doit calculer la somme. Donc la réponse est cinq.", 10, 10),
    ("es", "Primero calculamos la suma. Entonces la respuesta es cinco.", 9, 9),
    ("it", "Prima calcoliamo la somma. Quindi la risposta vale cinque.", 9, 9),
    ("pt", "Primeiro calculamos a soma dos números. Então temos cinco.", 8, 8),
    ("nl", "Eerst berekenen we de som. Dus het antwoord is vijf.", 10, 10),
    ("sv", "Först måste vi beräkna summan. Svaret är fem.", 8, 8),
    ("da", "Først skal vi beregne summen. Svaret er fem.", 8, 8),
    ("no", "Først skal vi beregne summen av tallene.", 7, 7),
    ("pl", "Najpierw musimy obliczyć sumę. Odpowiedź to pięć.", 7, 7),
    ("tr", "Önce toplamı bulmak gerekir. Cevap beş olur.", 7, 7),
    ("vi", "Đầu tiên, chúng ta cần tính tổng.", 7, 7),
    ("id", "Pertama kita harus hitung jumlah bilangan tersebut.", 7, 7),
    ("ru", "Сначала найдём сумму. Значит, ответ пять.", 6, 6),
    ("uk", "Спочатку знайдемо суму. Отже, відповідь п'ять.", 6, 6),
    ("bg", "Първо намираме сумата. Следователно отговорът е пет.", 7, 7),
    ("ar", "أولا نحسب مجموع الأعداد. إذن الجواب هو خمسة.", 8, 8),
    ("fa", "ابتدا مجموع اعداد را محاسبه می‌کنیم.", 6, 6),
    ("ur", "سب سے پہلے ہم جواب معلوم کریں گے۔", 8, 8),
    ("ko", "먼저 숫자의 합을 계산해야 합니다.", 5, 5),
    ("hi", "पहले हमें संख्याओं का योग निकालना होगा।", 7, 7),
    ("el", "Πρώτα πρέπει να υπολογίσουμε το άθροισμα.", 6, 6),
    ("he", "קודם כל צריך לחשב את הסכום.", 6, 6),
    # scripts without spaces: 2 characters, 4 Thai letters, are a word; runs are rounded up
    ("zh", "首先计算总和。所以答案是五。", 6, 6),
    ("zh", "我们", 1, 1),
    ("zh", "我", 1, 1),
    ("ja", "まず合計を計算する必要があります。", 8, 8),
    ("th", "เราต้องคำนวณผลรวม", 4, 4),
    # two scripts
    ("zh", "首先 we need to 计算 the sum", 2, 7),
    ("en", "wait, 我们 need to check", 4, 5),
    ("en", "Сначала let us check", 3, 4),
    ("ru", "Сначала let us check", 1, 4),
    ("zh", "首先计算。まず合計を計算する。", 2, 7),
    ("ja", "まず合計を計算する。首先计算这些数字的总和。", 5, 11),
    ("ja", "解答。まず計算する。", 4, 4),
    ("ko", "먼저 计算 합니다", 2, 3),
    ("en", "the pаypal sum", 2, 3),
    # two languages of one script, clause by clause
    ("en", "Let me think. Wir müssen die Zahl finden.", 3, 8),
    ("de", "Let me think. Wir müssen die Zahl finden.", 5, 8),
    ("en", "We add them, puis on calcule la somme, and we are done.", 7, 12),
    ("es", "Primeiro calculamos a soma dos números.", 0, 5),
    ("ru", "Спочатку знайдемо суму. Значит, ответ пять.", 3, 6),
    ("ar", "ابتدا مجموع اعداد را محاسبه می‌کنیم.", 0, 6),
    # no evidence: the clause before decides, or else the language that is asked for
    ("en", "Donc la somme est grande, vraiment énorme.", 0, 7),
    ("en", "Donc la somme est grande, juste comble", 0, 7),
    ("en", "Apfel birne kirsche", 3, 3),
    # one word in more than five
    ("en", "squares cubes primes factors terms dans", 6, 6),
    ("en", "squares dans primes", 0, 3),
    # English words that are others' function words
    ("en", "roll a die", 2, 2),
    ("en", "she was a man of art and war", 7, 7),
    # what is no word
    ("en", "x = 5, y2 and isPrime of snake_case, the GCD and 3rd", 4, 4),
    ("en", "we ask Schmidt and Müller", 3, 3),
    ("zh", "Fibonacci数列是什么", 3, 3),
    ("de", "wir fragen Schmidt", 3, 3),
    ("en", "𝑥 and 𝐝𝐢𝐞 ℝ", 1, 1),
    ("en", "", 0, 0),
    ("en", "12 + 30 = 42 🙂 …", 0, 0),
    # marks that are not seen
    ("en", "the\u200b su\u00adm\u200f of\u2060 it\ufeff", 4, 4),
    ("fa", "می‌کنیم", 1, 1),
    # Ｌｅｔ ｕｓ, wide
    ("en", "\uff2c\uff45\uff54 \uff55\uff53 \uff54\uff48\uff49\uff4e\uff4b", 3, 3),
    # é of two characters
    ("fr", "la re\u0301ponse est e\u0301gale", 4, 4),
    ("en", "don't well-known o’clock", 3, 3),
    ("en", "THIS IS SHOUTED LOUDLY", 4, 4),
]


@pytest.mark.parametrize(("language", "text", "target", "total"), COUNTS)
def test_words_of_a_language(language, text, target, total):
    assert count_words(text, language) == (target, total)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Find the value of x.", "en"),
        ("Berechne die Summe der Zahlen.", "de"),
        ("Résous l'équation: quelle est la valeur de x ?", "fr"),
        ("Найдите значение x.", "ru"),
        ("Знайдіть значення x.", "uk"),
        ("求x的值。", "zh"),
        ("次の値を求めよ。", "ja"),
        ("x의 값을 구하시오.", "ko"),
        ("จงหาค่าของ x", "th"),
        ("Find the sum: 首先计算总和首先计算总和", "zh"),
        ("2 + 2", None),
        ("Apfel", None),
        ("", None),
    ],
)
def test_language_of_a_prompt(text, language):
    assert language_of(text) == language


PROSE = [
    ("so $x+1$ is `code` and ``a`b`` c", "so is and c"),
    ("$5 and $10 are prices", "$5 and $10 are prices"),
    ("price $5, then $x$ is", "price $5, then is"),
    ("a\n```py\nwhile True: die\n```\nb", "a b"),
    ("a\n~~~\nb\n```\nc\n~~~\nd", "a d"),
    ("a\n```\nnever closed", "a"),
    (r"a \frac{one}{two} \boxed{the \text{box}} b", "a b"),
    (r"\begin{align}so\end{align} a \begin{b}\begin{b}x\end{b}\end{b} c", "a c"),
    (r"\[ so \] a \( so \) b $$ so $$ c", "a b c"),
    (r"\[ never closed", "never closed"),
    ("see https://a.de/die?der and a@die.de <b>now</b> or 1 < 2 > 1", "see and now or 1 < 2 > 1"),
    (r"costs \$5 or $x$", "costs 5 or"),
    ("$a\n\nb$ stays", "$a b$ stays"),
]


@pytest.mark.parametrize(("text", "prose"), PROSE)
def test_prose(text, prose):
    assert " ".join(prose_of(text).split()) == prose


def test_the_reward():
    text = "<think>Let me think. 首先</think>Die Antwort ist fünf."
    assert LanguageConsistency("English")([text]) == [0.75]
    assert LanguageConsistency("de-AT", part="summary")([text]) == [1.0]
    assert LanguageConsistency("zh", part="all")([text]) == [0.125]
    assert LanguageConsistency("en")(["<think>so we", "so we", "<think></think>so we"]) == [1.0, 1.0, 0.0]
    assert LanguageConsistency("en", no_words=None)(["<think>2 + 2</think>four"]) == [None]
    assert LanguageConsistency("en", ignore=["Jabbr"])(["the jabbr, der jabbr"]) == [0.5]


def test_the_language_of_a_column_or_of_the_prompt():
    logged = {}
    reward = LanguageConsistency(column="language")
    prompts = ["Find the sum.", "Find the sum.", [{"role": "user", "content": "Berechne die Summe."}], "2 + 2"]
    values = reward(["the sum"] * 4, prompts=prompts, language=["zh", None, None, None], log_metric=logged.__setitem__)
    assert values == [0.0, 1.0, 0.0, None]
    assert logged == {"rewards/language_consistency/unknown_language": 0.25}
    assert LanguageConsistency()(["the sum"] * 4, prompts=prompts) == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageConsistency("klingon"), "language 'klingon' is not one of am, ar, bg,"),
        (lambda: LanguageConsistency("en", column="a"), "not both"),
        (lambda: LanguageConsistency("en", part="cot"), "part must be one of thought, summary, all, it is 'cot'"),
        (lambda: LanguageConsistency(column="a")(["b"], prompts=["c"], d=[1]), "needs the column 'a'; there is d"),
        (lambda: LanguageConsistency()(["b"]), "needs prompts, or an argument"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_codes():
    assert [language_code(name) for name in ("EN", "zh_Hans", "Japanese", "pt-BR", "nb")] == [
        "en",
        "zh",
        "ja",
        "pt",
        "no",
    ]
