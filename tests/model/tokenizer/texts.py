"""Texts for tokenizer tests: a corpus of many scripts for training, and difficult ones for comparison."""

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the other dogs jump over the fox too.",
    "It's what we're told: they've said I'm sure you'll see that he'd rather not; don't they?",
    "In 1984 there were 1234567 things, 3.14 of them round; on 2026-11-22 at 10:05 there were 17.",
    "def function(self, value):\n    if value >= 10:\n        return {'key': [1, 22, 333]}\n\n\n    return None\n",
    "for (int i = 0; i < count; i++) {\n\tprintf(\"%d\\n\", values[i]);\n}\r\n",
    "Привет, мир! Как дела? Это простой текст на русском языке, и он нужен для примера.",
    "中文测试,你好世界。这是一个简单的句子。", "日本語のテキスト、ひらがなとカタカナ。", "한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك اليوم؟", "नमस्ते दुनिया, यह एक वाक्य है", "สวัสดีชาวโลก", "Γειά σου Κόσμε",
    "Café naïve über straße, señor; Ünïcödé ÉCOLE naïveÉcole", "🚀🎉 👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "    indented    text        with   runs of      spaces\n\n\n\nand lines\t\t\tand tabs",
] * 4  # fmt: skip

AWKWARD = [
    "",
    " ",
    "  leading and trailing   ",
    "a" + " " * 21 + "b\t\t\t\tc\n\n\n\n   \n  x   ",
    "\r\n\r\n x\r\n",
    "it's I'M we'Ve don'T they'LL you'd 'tis O'Re ''s",
    "1234567890 3.14159 1,000,000 ½ ²³ ٣٤٥ Ⅷ",
    "def f(x):\n\tif x >= 10:\n        return {'a': [1, 22, 333, 4444, 55555]}  # ok?\n\n\n",
    "中文测试,日本語のテキスト。한국어 문장",
    "Привет мир! ﷽ Ünïcödé",
    "🚀🎉 👩‍👩‍👧‍👦 🇩🇪 é ü ñ à",
    "x" * 300,
    "\u00a0\u2003\u3000 z\u200b\ufeff",
    "\u0000\u0007\u001b\u007f\u0085\u2028\ufffd\ufffe\U0010ffff\ue000",
    "https://a.b/c?d=e&f=%20#g ~~~!!!???",
    "y▁x Ġ Ċ",
    "<0x0A> <s> </s> <unk> [PAD3]",
]
"""Tokenized identically in llama.cpp and transformers by every family."""
MARKED = ["cafe\u0301 n\u0303", "สวัสดีชาวโลก ไทย", "नमस्ते हिन्दी", "e\u0301e\u0301!"]
"""With combining marks, the Latin ones not in composed form."""
CASED = ["naïveÉcole iPhoneÖl", "ПриветМир", "ÜBER ÀÉA aÉb éAb"]
"""With letters beyond ASCII that change case within a word."""
