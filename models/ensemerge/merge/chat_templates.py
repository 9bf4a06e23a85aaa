"""The chat formats that recipes name, as Jinja templates of our own for what their makers published.

Each takes `messages` (`role`, `content`) and `add_generation_prompt`, as transformers' `apply_chat_template` does.
"""

from __future__ import annotations

from collections.abc import Mapping

# ChatML (OpenAI 2023): every turn between two markers.
_CHATML = """\
{%- for turn in messages -%}
{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Alpaca (Taori et al. 2023): headings; the system's text stands alone above them.
_ALPACA = """\
{%- set headings = {'user': '### Instruction:\\n', 'assistant': '### Response:\\n', 'system': ''} -%}
{%- for turn in messages -%}
{{ headings.get(turn.role, '### Input:\\n') ~ (turn.content | trim) ~ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ headings['assistant'] }}{%- endif -%}
"""

# Llama 3 (Meta 2024): a header names the role, a token ends the turn.
_LLAMA3 = """\
{{- bos_token -}}
{%- for turn in messages -%}
{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ (turn.content | trim) ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

# Mistral (Mistral AI 2023): instructions in brackets; a system's text opens the first instruction.
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(opening='') -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}
{%- set state.opening = turn.content ~ '\\n\\n' -%}
{%- elif turn.role == 'user' -%}
{{ ' [INST] ' ~ state.opening ~ turn.content ~ ' [/INST]' }}
{%- set state.opening = '' -%}
{%- elif turn.role == 'assistant' -%}
{{ ' ' ~ turn.content ~ eos_token }}
{%- else -%}
{{ raise_exception('expected the roles system, user and assistant, got ' ~ turn.role) }}
{%- endif -%}
{%- endfor -%}
"""

# EXAONE (LG AI Research 2024): role markers; all but the user's turns end with a token, and a system turn comes first.
_EXAONE = """\
{%- if messages and messages[0].role != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}
{%- for turn in messages -%}
{{ '[|' ~ turn.role ~ '|]' ~ turn.content ~ ('' if turn.role == 'user' else '[|endofturn|]') ~ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
"""

CHAT_TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
