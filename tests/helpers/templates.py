# ruff: noqa: E501
"""Chat templates in the form of known model families, with and without generation marks, and a tokenizer for them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ASKS = "{% if add_generation_prompt %}"
LOOP = "{% for m in messages %}"
ASSISTANT = "{% if m.role == 'assistant' %}"
ALTERNATES = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
CHATML = (
    LOOP
    + "<|im_start|>{{ m.role }}\n"
    + ASSISTANT
    + "[[{{ m.content }}<|im_end|>\n]]{% else %}{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}" + ASKS + "<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": TOOLS + CHATML.replace("{{ m.content }}<|im_end|>\n]]", "{{ m.content or '' }}" + CALLS + "<|im_end|>\n]]"),
    # Thoughts are left out of all turns but those after the last question, where there is always a block of them.
    "qwen3": (
        "{% set last = namespace(user=-1) %}" + LOOP + "{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
        "{% endfor %}" + LOOP + "<|im_start|>{{ m.role }}\n" + ASSISTANT + "[["
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
        "{% if loop.index0 > last.user %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n]]{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASKS + "<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "llama-2": (
        LOOP + ASSISTANT + "[[ {{ m.content.strip() }} {{ eos_token }}]]{% elif m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n" + ASSISTANT + "[[{{ m.content | trim }}"
        "<|eot_id|>]]{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}" + ASKS
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        "[[ {{ m.content | trim }}{{ eos_token }}]]{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}" + LOOP + ALTERNATES + ASSISTANT + "<start_of_turn>model\n[[{{ m.content | trim }}<end_of_turn>\n]]"
        "{% else %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}" + ASKS
        + "<start_of_turn>model\n{% endif %}"
    ),
    # The end token comes once, behind all turns.
    "phi-3": (
        LOOP + "<|{{ m.role }}|>\n" + ASSISTANT + "[[{{ m.content }}<|end|>\n]]{% else %}{{ m.content }}<|end|>\n{% endif %}"
        "{% endfor %}" + ASKS + "<|assistant|>\n{% elif messages[-1].role == 'assistant' %}[[{{ eos_token }}]]{% else %}"
        "{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        LOOP + "<|{{ m.role }}|>\n" + ASSISTANT + "[[{{ m.content }}{{ eos_token }}\n]]{% else %}{{ m.content }}{{ eos_token }}\n"
        "{% endif %}{% endfor %}" + ASKS + "<|assistant|>\n{% endif %}"
    ),
    # What asks for an answer opens a thought, and no finished turn has one.
    "deepseek-r1": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}<|Assistant|>"
        "[[{{ m.content.split('</think>')[-1] }}{{ eos_token }}]]{% endif %}{% endfor %}" + ASKS
        + "<|Assistant|><think>\n{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}" + LOOP + "<|START_OF_TURN_TOKEN|>" + ASSISTANT + "<|CHATBOT_TOKEN|>[[{{ m.content.strip() }}"
        "<|END_OF_TURN_TOKEN|>]]{% else %}<|USER_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}"
        + ASKS + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "granite": (
        LOOP + "<|start_of_role|>{{ m.role }}<|end_of_role|>" + ASSISTANT + "[[{{ m.content }}<|end_of_text|>\n]]{% else %}"
        "{{ m.content }}<|end_of_text|>\n{% endif %}{% endfor %}" + ASKS
        + "<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    ),
    "smollm": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
    ),
    # No new line behind the last turn of all.
    "tulu": (
        LOOP + ASSISTANT + "<|assistant|>\n[[{{ m.content }}{{ eos_token }}{% if not loop.last %}\n{% endif %}]]{% else %}"
        "<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}" + ASKS + "<|assistant|>\n{% endif %}"
    ),
    # Without special tokens.
    "vicuna": (
        LOOP + ASSISTANT + "ASSISTANT:[[ {{ m.content }}{{ eos_token }}]]{% else %}USER: {{ m.content }} {% endif %}{% endfor %}"
        + ASKS + "ASSISTANT:{% endif %}"
    ),
    "alpaca": (
        LOOP + ASSISTANT + "### Response:\n[[{{ m.content }}\n\n]]{% else %}### Instruction:\n{{ m.content }}\n\n{% endif %}"
        "{% endfor %}" + ASKS + "### Response:\n{% endif %}"
    ),
}  # fmt: skip
"""With [[ and ]] around what the assistant says."""
SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|User|>", "<|Assistant|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
]  # fmt: skip
TEXTS = [
    "What is the capital of Peru?",
    "The capital is Lima.",
    "And of Cuba? Thanks.",
    "### Instruction: USER: [INST]",
]


def template(family: str, marked: bool) -> str:
    """A family's template, with or without generation marks."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return TEMPLATES[family].replace("[[", begin).replace("]]", end)


def chat_tokens(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that begins texts with <s> and knows all families' special tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
