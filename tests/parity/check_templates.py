"""Checks Hestia's chat templates against those the model families publish, on fresh random conversations.

    cmake --build build --target check_template
    python -m venv VENV && VENV/bin/pip install transformers==5.23.0 jinja2 && VENV/bin/pip install --no-deps trl==1.16.0 axolotl==0.19.0
    VENV/bin/python tests/parity/check_templates.py --published tulu=PATH --published deepseek=PATH

The published templates are others' work and not kept here. trl and axolotl ship most of them (the packages are only looked into, never
imported). For the rest, and in place of any, --published NAME=PATH takes a .jinja file or a tokenizer_config.json of the
family: OLMoE-1B-7B-0924-Instruct for `tulu`, DeepSeek-V2-Lite-Chat for `deepseek`. transformers renders them.

Two texts of every conversation are compared: the whole, and the prompt of its last answer (what the published template gives for
generation). Differences that are meant are written down in `Family` below and in docs/recipes.md.

Every run draws new conversations; --seed N repeats one. Exit 0: all templates were checked and all texts are equal.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import random
import re
import secrets
import subprocess
import sys

from transformers.utils.chat_template_utils import render_jinja_template

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOS, EOS = "<<bos>>", "<<eos>>"
AXOLOTL = "axolotl/utils/chat_templates/templates/"
TRL = "trl/chat_templates/"


def unchanged(text):
    return text


def without_space_before_instruction(text):
    """Mixtral's template writes the space that sentencepiece puts in front of a text itself."""
    return re.sub(rf"({BOS}|{EOS}|^) \[INST\]", r"\1[INST]", text)


def without_space_after_tokens(text):
    """Phi's vocabulary has these tokens swallow the white space after them."""
    return re.sub(r"(<\|(?:system|user|assistant|end)\|>)\s+", r"\1", text)


def without_identity(text):
    """gpt-oss's template begins with a system turn: identity, today's date, reasoning effort, channels."""
    return re.sub(r"^<\|start\|>system<\|message\|>.*?<\|end\|>", "", text, flags=re.DOTALL)


@dataclasses.dataclass
class Family:
    """A Hestia template, a published one, and every way in which they are meant to differ."""
    template: str
    label: str
    source: str = ""  # in an installed package
    published: object = unchanged  # what is done to the published text first
    tails: tuple = ("",)  # what the published text may have after the last answer
    prompt_tail: str = ""  # what Hestia's prompt has after the published one
    options: dict = dataclasses.field(default_factory=dict)
    thoughts: bool = False  # answers may begin with <think>...</think>


FAMILIES = [
    Family("tulu", "OLMoE-1B-7B-0924-Instruct", tails=("\n",)),
    Family("chatml", "ChatML: Qwen1.5, Qwen2 with a system message", AXOLOTL + "chatml.jinja", tails=("\n",)),
    Family("chatml", "Qwen3-Instruct-2507", TRL + "qwen3_instruct_2507.jinja", tails=("\n",)),
    Family("qwen3", "Qwen3", TRL + "qwen3.jinja", tails=("\n",), options={"enable_thinking": False}, thoughts=True),
    Family("mistral", "Mixtral-8x7B-Instruct-v0.1", AXOLOTL + "mistral_v1.jinja", without_space_before_instruction),
    Family("phi3", "Phi-3.5", TRL + "phi3_5.jinja", without_space_after_tokens, tails=(EOS,)),
    Family("deepseek", "DeepSeek-V2-Chat"),
    Family("harmony", "gpt-oss", TRL + "gptoss.jinja", without_identity,
           prompt_tail="<|channel|>final<|message|>"),
]


def installed(path):
    """A file of an installed package, without importing it; None when the package or the file is missing."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    file = pathlib.Path(spec.submodule_search_locations[0]) / rest
    return file if file.is_file() else None


def read_template(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = json.loads(text)["chat_template"]
    return text


class Conversations:
    """Random conversations: a system message or none, then questions and answers in turn."""

    WORDS = ["red", "Blue", "7", "?", "...", "ä", "中文", "\U0001f600", "[INST]", "User:", "#", "{x}", "</s>", "\\n", "'"]
    JOINTS = [" ", " ", " ", "\n", "\n\n", "  ", "\t", "\u00a0", ""]

    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self):
        draw = self.random
        parts = [draw.choice(["", "", " ", "\n", "\n\n  "])]
        for _ in range(draw.randrange(1, 8)):
            parts += [draw.choice(self.WORDS), draw.choice(self.JOINTS)]
        return "".join(parts) + draw.choice(["", "", "x", "\n", " "])

    def answer(self, thoughts):
        draw = self.random
        if not thoughts or draw.randrange(2):
            return self.text()
        inner = draw.choice(["", "\n", "\n\n", self.text()])
        return draw.choice(["<think>", "<think>\n", "", "\n<think>"]) + inner + draw.choice(["</think>", "\n</think>\n\n"]) + self.text()

    def draw(self, family):
        messages = []
        if self.random.randrange(2):
            messages.append({"role": "system", "content": self.random.choice([self.text(), self.text(), ""])})
        for _ in range(self.random.randrange(1, 5)):
            messages.append({"role": "user", "content": self.text()})
            messages.append({"role": "assistant", "content": self.answer(family.thoughts)})
        return messages


def render(family, template, messages, prompt):
    text, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, bos_token=BOS,
                                    eos_token=EOS, **family.options)
    return family.published(text[0])


def written(answer, pieces):
    text = BOS if answer["begin_sequence"] else ""
    for piece in pieces:
        text += piece["text"] if "text" in piece else piece["token"] or EOS
    return text


def last_prompt(answer):
    """Up to where the last answer begins, and whether it begins with thoughts."""
    pieces = answer["pieces"]
    end = max(i for i, piece in enumerate(pieces) if piece["completion"])
    while end > 0 and pieces[end - 1]["completion"]:
        end -= 1
    return written(answer, pieces[:end]), pieces[end].get("token") == "<think>"


def differences(family, template, messages, answer):
    """Texts that differ, as (what, published, Hestia's)."""
    whole = written(answer, answer["pieces"])
    published = render(family, template, messages, False)
    if published not in [whole + tail for tail in family.tails]:
        yield "whole", published, whole
    prompt, thinks = last_prompt(answer)
    generation = dataclasses.replace(family, options={}) if thinks else family
    published = render(generation, template, messages[:-1], True) + family.prompt_tail
    if published != prompt:
        yield "prompt", published, prompt


def compare(family, template, arguments):
    conversations = Conversations(f"{arguments.seed} {family.label}")
    drawn = [conversations.draw(family) for _ in range(arguments.count)]
    lines = "".join(json.dumps({"template": family.template, "messages": messages}) + "\n" for messages in drawn)
    program = subprocess.run([arguments.bin / "check_template"], input=lines, capture_output=True, text=True)
    answers = [json.loads(line) for line in program.stdout.split("\n") if line]
    if program.returncode != 0 or len(answers) != len(drawn):
        raise SystemExit(f"check_template laid out {len(answers)} of {len(drawn)} conversations: {program.stderr.strip()}")
    different = 0
    for messages, answer in zip(drawn, answers):
        for what, published, ours in differences(family, template, messages, answer):
            different += 1
            if different == 1:
                print(f"{what} of {json.dumps(messages, ensure_ascii=False)}\n  published {published!r}\n  Hestia    {ours!r}")
    return different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/bin", help="folder of check_template")
    parser.add_argument("--published", action="append", default=[], metavar="NAME=PATH", help="a published template for Hestia's NAME")
    parser.add_argument("--only", choices=sorted({family.template for family in FAMILIES}), help="check this template alone")
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--count", type=int, default=2000, help="conversations for each template")
    arguments = parser.parse_args()
    if not (arguments.bin / "check_template").is_file():
        parser.error(f"--bin: there is no check_template in {arguments.bin}; build it")
    given = {}
    for entry in arguments.published:
        name, equals, path = entry.partition("=")
        if not equals or name not in {family.template for family in FAMILIES}:
            parser.error(f"--published: must be NAME=PATH with a template of {sorted({f.template for f in FAMILIES})}, got {entry!r}")
        given[name] = pathlib.Path(path)
    print(f"seed {arguments.seed}")
    good = True
    for family in [family for family in FAMILIES if arguments.only in (None, family.template)]:
        path = given.get(family.template) or installed(family.source)
        if path is None:
            where = f"install the package with {family.source}, or " if family.source else ""
            print(f"NOT CHECKED  {family.template} ({family.label}): {where}give --published {family.template}=PATH")
            good = False
            continue
        different = compare(family, read_template(path), arguments)
        print(f"{'DIFFERS' if different else 'equal'}  {family.template} ({family.label}), {arguments.count} conversations, {path}", flush=True)
        good = good and different == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
