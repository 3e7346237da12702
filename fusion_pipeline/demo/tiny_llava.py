"""Makes a LLaVA-NeXT checkpoint that a laptop serves: real architecture, processor, tokenizer and
chat template, random weights. It answers with words that mean nothing.

    python fusion_pipeline/demo/tiny_llava.py FOLDER      (with torch and transformers)

For trying out what serves and asks a model. Its tokenizer is trained here, on the sentences below,
so nothing is downloaded; the weights are the same on each run.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VOCABULARY = 1024
TOKENS = 8192
"""Longest context."""
TILE, PATCH = 56, 14
GRIDS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
SENTENCES = (
    "Describe the picture for somebody who can't see it, in plain text and in detail.",
    "The evidence lists tags, objects with their boxes, lines of text and the text of the page.",
    "A red square stands above a blue circle on a white ground, left of a small green triangle.",
    "Two dogs and a cat lie on a wooden table beside a window; behind them hangs a printed sign.",
    "The first line reads OPEN, the second one CLOSED, the third one 24 hours; numbers follow.",
    "A long street with parked cars leads to a brick building under a grey sky, seen from below.",
)
TURNS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} "
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna's turns, as the published LLaVA-NeXT checkpoints have them."""
PUBLISHED = {
    "vision_tower.": "vision_tower.vision_model.",
    "language_model.": "language_model.model.",
}
"""Beginnings of the weights' names, as transformers saves them and as they are published."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    start = bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=TOKENS,
        padding_side="left",
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=GRIDS,
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TURNS,
        num_additional_image_tokens=1,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    names = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    special = {field: ids[name] for field, name in names.items()}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
            projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=TOKENS,
            **special,
        ),
        image_token_index=ids["<image>"],
        image_grid_pinpoints=GRIDS,
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return model


def published_name(name: str) -> str:
    """Of a weight, as in the published checkpoints, which is what vLLM reads."""
    name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    for short, full in PUBLISHED.items():
        if name.startswith(short) and not name.startswith((full, "language_model.lm_head.")):
            return full + name.removeprefix(short)
    return name


def make(folder: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    weights = folder / "model.safetensors"
    named = {published_name(name): tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a tiny LLaVA-NeXT with random weights.")
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
