"Chat templates in the style of those that are published, and a byte-level tokenizer for each."
from tokenizers import pre_tokenizers
from tiny_models import make_tokenizer

CHATML = """{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] }}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The form that TRL trains on: the assistant's tokens are marked, the line break is not one of them.
MARKED = """{%- for m in messages %}{%- if m['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- m['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Llama 3: BOS, headers, tools in front of the first turn, trimmed content.
LLAMA3 = """{{- bos_token }}{%- if tools %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools: ' }}
{{- tools | tojson }}{{- '<|eot_id|>' }}{%- endif %}{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if 'tool_calls' in m %}{{- m.tool_calls[0].function | tojson }}
{%- else %}{{- m['content'] | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Gemma: BOS, no system turn, the assistant is called model, and EOS is not what ends a turn.
GEMMA = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{%- endif %}{%- for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# Qwen 3: the last answer has its thoughts or an empty thought, earlier ones have none.
THINKING = """{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}
{%- set said = m['content'].split('</think>')[-1].lstrip('\\n') %}
{%- if m['role'] == 'assistant' and loop.last %}
{%- set found = m['content'].split('</think>')[0].split('<think>')[-1] %}
{%- set thought = found if '</think>' in m['content'] else '' %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- said + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# DeepSeek R1: the prompt opens a thought, and every answer loses its own.
OPENING = """{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'assistant' %}
{{- '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|eos|>' }}
{%- else %}{{- '<|User|>' + m['content'] }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

CHAT = ("<|im_start|>", "<|im_end|>")
TEMPLATES = { # name → template, special tokens, roles
    "chatml": (CHATML, CHAT, {}), "marked": (MARKED, CHAT, {}), "thinking": (THINKING, CHAT, {}),
    "llama3": (LLAMA3, ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
               {"bos_token": "<|begin|>"}),
    "gemma": (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), {"bos_token": "<bos>"}),
    "opening": (OPENING, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|eos|>"),
                {"bos_token": "<|begin|>"})}


def chat_tokenizer(name):
    "A byte-level tokenizer with one of the templates; one with a BOS adds it to every text."
    from tokenizers.processors import TemplateProcessing
    template, special, roles = TEMPLATES[name]
    tokenizer = make_tokenizer(*special, "<|padding|>", pad_token="<|padding|>", **roles)
    # The fixture's own puts a space before every text, also behind a special token.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos := roles.get("bos_token"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))])
    if "<|im_end|>" in special: tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer
