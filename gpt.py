"""GPT-2 in one file, to be read from the first line to the last, and then to be run.

A GPT (generative pre-trained transformer) is a neural network that continues a text. It reads
tokens, which are words, parts of words or single bytes, and gives every token that it knows a score
for coming next. One token is drawn by these scores and appended, and the network is asked again.
Training, first on much text of every kind, changes its parameters, millions of numbers, step by
step, until tokens that really come next get high scores. A transformer is made of blocks in which
tokens exchange information.

    python gpt.py train                             a small GPT learns a short story by heart
    python gpt.py sample --prompt "I HAD always"    it continues a text
    python gpt.py sample --gpt2 124M                OpenAI's GPT-2 does (it downloads 500 MB)
    python gpt.py train --gpt2 124M --data my.txt   GPT-2 learns on, from a text of yours

The first takes about two minutes on two processor cores. Its loss, which measures how badly the
model predicts, starts near 10.8, like blind guessing among 50,257 tokens, and ends below 0.5: then
the model recites "I HAD always thought Jack Gisburn rather a cheap genius". The validation loss is
that of the last tenth of the story, which is kept from training. It falls while the model learns
what English looks like, and rises when it learns this one story by heart, too sure of its words.

Sections 1 to 7 are the GPT. Section 8, files, devices and options, can be skipped.

    1 Config    the numbers that fix a model's shape     5 Training      how parameters are found
    2 Layers    attention and what stands around it      6 Decoding      how text is drawn from it
    3 Model     embeddings, blocks, scores, the loss     7 GPT-2 weights OpenAI's file and ours
    4 Dataset   from a text to tokens and windows        8 Plumbing      files, devices, options

Shapes are written in letters, as (B, T) -> (B, T, C). src/... are files of github.com/openai/gpt-2.

    letter   meaning                                                     in GPT-2 124M
    B        batch: how many sequences are read side by side             any number
    T        time: tokens of each sequence that are read in one call     1 to 1,024
    S        tokens that can be seen: T and those read in earlier calls  1 to 1,024
    C        channels: the numbers that stand for one token              768
    H        heads: attentions that work side by side                    12
    D        channels of one head, C / H                                 64
    V        vocabulary: how many different tokens there are             50,257
"""

import argparse
import codecs
import collections
import ctypes
import datetime
import gc
import http.client
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, default_collate

# ==================================================================================================
# 1 Config


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, by default the smallest GPT-2's; an impossible one is a UserError.
    Radford 2019, "Language Models are Unsupervised Multitask Learners" (the GPT-2 paper), 2.3."""

    vocab_size: int = 50257  # V
    context_length: int = 1024  # the most tokens that the model can read at once
    n_embd: int = 768  # C
    n_head: int = 12  # H
    n_layer: int = 12  # blocks, one after the other
    dropout: float = 0.0  # the share of numbers that training sets to 0
    fused: bool = True  # True: PyTorch's fast routines; False: the same by hand

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_embd", "n_head", "n_layer"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"{name} is {size}; it must be a whole number from 1 up")
        if self.n_embd % self.n_head != 0:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


class UserError(ValueError):
    """A mistake that the user can mend: the command line shows it as one line."""


GPT2_CONFIGS = {  # named after the number of their parameters, in millions
    "124M": GPTConfig(n_embd=768, n_head=12, n_layer=12),
    "355M": GPTConfig(n_embd=1024, n_head=16, n_layer=24),
    "774M": GPTConfig(n_embd=1280, n_head=20, n_layer=36),
    "1558M": GPTConfig(n_embd=1600, n_head=25, n_layer=48),
}
SMALL_CONFIG = GPTConfig(context_length=64, n_embd=384, n_head=6, n_layer=2)  # for a laptop


# ==================================================================================================
# 2 Layers
# Inside the model, C numbers stand for each token. A layer reads these numbers and adds its result
# to them. They are called the residual stream, since a layer contributes only the rest, the
# residue, that is still missing. A sum also hands its gradient on unchanged, so even the first of
# many layers gets one that it can learn from (He et al. 2016, "Deep Residual Learning for Image
# Recognition"). Most layers have a Linear(m, n), PyTorch's nn.Linear: a learned matrix W (n, m) and
# a bias b (n,), which make n numbers of m, x Wᵀ + b. (Section 8 makes it quicker on a CPU.)
#
# Dropout sets a random share of numbers to 0 while the model trains, and enlarges the others to
# keep their mean: after the embeddings (section 3), on the attention weights, and on each layer's
# result. A model that can't rely on any single number finds it harder to learn a text by heart
# (Srivastava et al. 2014, "Dropout"). A model in use has none.
class LayerNorm(nn.Module):
    """Bring the C numbers of each token to mean 0 and variance 1, then scale and shift them.

        y = (x - mean) / sqrt(variance + eps) * weight + bias          (B, T, C) -> (B, T, C)

    The stream grows with every result that is added, and layers learn best from numbers of one
    size. Mean and variance are taken over the C channels of one token. weight and bias (C,) are
    learned: each channel gets the size and the offset that suit the next layer. Source: Ba et al.
    2016, "Layer Normalization", section 3; src/model.py, norm()."""

    def __init__(self, config):
        super().__init__()
        self.fused = config.fused
        self.eps = 1e-5  # keeps a token whose channels are all equal from a division by 0
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        if not self.fused:  # in 32 bits: float16 ends at 65,504, below the square of 256
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide - wide.mean(dim=-1, keepdim=True)  # (B, T, C) - (B, T, 1)
            variance = wide.square().mean(dim=-1, keepdim=True)  # divided by C, not by C - 1
            normalized = wide / torch.sqrt(variance + self.eps)  # (B, T, C)
            return (normalized * self.weight + self.bias).to(x.dtype)
        return F.layer_norm(x, self.weight.shape, weight=self.weight, bias=self.bias, eps=self.eps)


class GELU(nn.Module):
    """A smooth version of max(0, x): x times the chance that a normal random number is below x.
    This is not the exact function but an approximation by tanh, off by less than 0.0005: it was
    faster once, and GPT-2 was trained with it. Source: Hendrycks and Gimpel 2016, "Gaussian Error
    Linear Units", section 2; src/model.py, gelu()."""

    def __init__(self, config):
        super().__init__()
        self.fused = config.fused

    def forward(self, x):
        if not self.fused:
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
            return 0.5 * x * (1 + torch.tanh(inner))
        return F.gelu(x, approximate="tanh")


# Attention brings information from one token to another. Each token makes three vectors of its C
# numbers: a query (what am I looking for?), a key (what can I be found by?) and a value (what do I
# tell whoever finds me?). The score of a query and a key is their scalar product, large where both
# point the same way. Softmax turns the scores s of a query into positive weights with the sum 1,
#     softmax(s)[i] = exp(s[i]) / (exp(s[0]) + exp(s[1]) + ...)
# and the query's token receives the mean of all values, each counted with its weight:
#     attention(q, k, v) = softmax(q kᵀ / sqrt(D) + mask) v
#
# Why the square root? A score is a sum of D products of either sign, typically sqrt(D) times as
# large as one product. Softmax of large numbers puts nearly all weight on one token, and a small
# change of a score changes hardly anything: its gradient is almost 0, and little is learned.
#
# Why the mask? The model has to predict the next token. If a token could see even one of those
# after it, training would teach it to copy the answer: the loss would fall to almost 0, and the
# model would be useless for writing, where the next token isn't there yet. The mask makes the
# scores of later tokens -∞ before the softmax. exp(-∞) is 0, and the weights that remain have the
# sum 1, which they would not if they were set to 0 after it. As row t of the result depends on
# tokens 0 to t alone, one pass over a text trains the predictions at all its positions at once. An
# example for a pencil, with three tokens and D = 2 (sqrt(2) is 1.41):
#
#             q       k       v       q kᵀ / 1.41, masked    the weights, rounded    result
#   I       (1, 0)  (0, 1)  (1, 0)    0.00    -∞     -∞      1.00  0.00  0.00      (1.00, 0.00)
#   HAD     (0, 2)  (1, 0)  (0, 1)    1.41   0.00    -∞      0.80  0.20  0.00      (0.80, 0.20)
#   always  (1, 0)  (1, 1)  (1, 1)    0.00   0.71   0.71     0.20  0.40  0.40      (0.60, 0.80)
def attention(q, k, v, mask, dropout=0.0):
    """The formula, in each head: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).
    mask (T, S), bool, is True where a query may see a token. Source: Vaswani et al. 2017,
    "Attention Is All You Need", section 3.2.1."""
    scores = q @ k.transpose(-2, -1)  # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    scores = scores / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)  # over the S tokens: each row has the sum 1
    weights = F.dropout(weights, dropout)  # when a model is in use, dropout is 0
    return weights @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Attention of a text to itself, in H heads: (B, T, C) -> (B, T, C).
    A softmax can look for one kind of thing. H heads, each on its own D = C / H channels, look for
    H things at once: a verb, the last name, an opening quote. Their results are put side by side,
    and the projection, a learned matrix, mixes them, so that what one head has found can reach
    every channel of the stream. Source: Vaswani et al. 2017, section 3.2.2."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.config = config
        self.layer = layer  # the number of the block, by which a cache knows its keys and values
        C = config.n_embd
        self.query = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.projection = Linear(C, C)

    def forward(self, x, cache=None):
        q = self.split_heads(self.query(x))  # (B, T, C) -> (B, H, T, D)
        k = self.split_heads(self.key(x))
        v = self.split_heads(self.value(x))
        if cache is not None:  # section 6 keeps keys and values of earlier tokens, in float32
            k, v = cache.extend(self.layer, k, v)  # (B, H, T, D) -> (B, H, S, D)
        y = self.attend(q.to(k.dtype), k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(start_dim=2)  # -> (B, T, H, D) -> (B, T, C)
        y = self.projection(y.to(x.dtype))
        return F.dropout(y, self.config.dropout, training=self.training)

    def split_heads(self, x):
        """(B, T, C) -> (B, T, H, D) -> (B, H, T, D): head 0 has the first D channels, and so on."""
        return x.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)

    def attend(self, q, k, v):
        """attention(), by hand or by PyTorch's fast routine for the same arithmetic."""
        dropout = self.config.dropout if self.training else 0.0
        T = q.shape[2]
        S = k.shape[2]
        if self.config.fused and T == S:  # is_causal is for texts of which nothing was read before
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        if self.config.fused and T == 1 and q.is_cpu:
            return attention_of_one(q, k, v)
        # Query i sees tokens up to S - T + i. (2, 3): [[True, True, False], [True, True, True]].
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
        if self.config.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return attention(q, k, v, mask=mask, dropout=dropout)


class FeedForward(nn.Module):
    """Work on what a token has gathered, for each by itself: gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂.
    Attention only takes means; here conclusions are drawn from them. Each of the 4C hidden numbers
    tells how much of one pattern is in a token's C numbers. To each belongs a row of W₂ᵀ, C numbers
    as well, and so much of this row is added to the stream. Two thirds of a block's weights are
    here. Without the GELU between them, two matrices can do no more than one, their product. The
    width, 4C, is that of Vaswani et al. 2017, section 3.3. Source: src/model.py, mlp()."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.dropout = config.dropout
        self.expand = Linear(C, 4 * C)
        self.gelu = GELU(config)
        self.projection = Linear(4 * C, C)

    def forward(self, x):
        hidden = self.gelu(self.expand(x))  # (B, T, C) -> (B, T, 4C)
        y = self.projection(hidden)  # (B, T, 4C) -> (B, T, C)
        return F.dropout(y, self.dropout, training=self.training)


class TransformerBlock(nn.Module):
    """Attention between tokens, then the feed-forward network on each: (B, T, C) -> (B, T, C).
    Both read the stream through a LayerNorm. The Transformer of 2017 had its LayerNorms on the
    stream, after each sum, where they rescaled every gradient on its way back: it needed a long
    warm-up. With "pre-LayerNorm" the stream is nothing but sums: training is steadier. Source:
    GPT-2 paper, 2.3; Xiong 2020, "On Layer Normalization in the Transformer Architecture"."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.norm_1 = LayerNorm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.norm_2 = LayerNorm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm_1(x), cache)
        return x + self.feed_forward(self.norm_2(x))


# ==================================================================================================
# 3 Model
#     x = token_embedding[tokens] + position_embedding[0, 1, ..., T - 1]     (B, T) -> (B, T, C)
#     x = block(x), n_layer times                                            (B, T, C)
#     logits = final_norm(x) token_embeddingᵀ                                (B, T, C) -> (B, T, V)
#
# A token is a number from 0 to V - 1. Two learned tables turn it into C numbers: the row of the
# token, its embedding, plus the row of its position, without which a layer of attention would give
# a token the same result in whatever order the tokens before it stand. There are context_length
# positions, so no longer text can be read at once. Any shorter one can, by the same weights: each
# matrix acts on the C numbers of one token at a time, however many tokens there are.
#
# The scores at the end, called logits, are scalar products of a position's C numbers with the
# embeddings of all tokens: the output head is "tied" to the table. So tokens with similar
# embeddings get similar scores (Press and Wolf 2017, "Using the Output Embedding to Improve
# Language Models"), and a second table of V C = 38.6 million numbers is saved: 124M has 124.4
# million parameters, and would have 163.0 untied.
class GPT(nn.Module):
    """tokens (B, T), int64 -> logits (B, T, V): at each position, a score for every next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.n_embd))
        self.blocks = nn.ModuleList(TransformerBlock(config, n) for n in range(config.n_layer))
        self.final_norm = LayerNorm(config)
        # A "meta" tensor has a shape and no memory: its numbers will come from a file.
        if not self.token_embedding.is_meta:
            self.init_weights()

    def init_weights(self):
        """Each block adds two results to the stream, and the variances of 2 n_layer results add up.
        So the matrices that make them, all called `projection`, start with a standard deviation of
        0.02 / sqrt(2 n_layer): the stream ends at one size for any n_layer (GPT-2 paper, 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)  # as in src/model.py, but for positions
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None, last_only=False):
        """cache: tokens come after those that it holds (section 6). Too many are a UserError.
        last_only: compute the logits of the last position alone, (B, 1, V)."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise UserError(f"{end} tokens don't fit the context of {self.config.context_length}")
        x = F.embedding(tokens, self.token_embedding)  # (B, T) -> (B, T, C)
        x = x + self.position_embedding[start:end]  # + (T, C), the same for each sequence
        x = F.dropout(x, self.config.dropout, training=self.training)
        for block in self.blocks:
            x = block(x, cache)  # (B, T, C)
        if cache is not None:
            cache.length = end
        x = self.final_norm(x[:, -1:] if last_only else x)  # (B, T, C) or (B, 1, C)
        return linear(x, self.token_embedding)  # (B, T, C) @ (C, V) -> (B, T, V)


# Softmax of the logits gives each token its probability to come next. The probability of a text is
# the product of those of its tokens, each given the tokens before it, and training makes the texts
# that people wrote as probable as it can. A logarithm turns the product, too small to be stored,
# into a sum, and with a minus sign a small number is good. So the loss is the mean of -log p over
# all tokens, p being the probability that the model gave to the token that really came. With
# natural logarithms its unit is the nat. A loss of 3.0 means p = exp(-3.0), 1 in 20; 0 would be
# certainty. A new model gives every token about 1 / V, so it starts near ln V, 10.8 for GPT-2.
def cross_entropy(logits, targets):
    """The mean of -log softmax(logits)[target], in nats, a scalar; logits (..., V), targets (...).
    By the definition of softmax, -log p is the logarithm of the sum of all exp(logit), called
    logsumexp, minus the logit of the target. 16 bits are too coarse for such sums."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)  # (B, T, V) -> (B, T)
    return (logits.logsumexp(dim=-1) - chosen).mean()


# ==================================================================================================
# 4 Dataset
# A text is stored as bytes, numbers from 0 to 255: an English letter is one, an é two, most emoji
# four. The 256 bytes can write any text, but long, and a model reads only so many tokens at once.
# Byte-pair encoding makes a new token of the most frequent pair of neighbours, and repeats this
# until the vocabulary is large enough: GPT-2's has the 256 bytes, 50,000 merged pairs, and
# <|endoftext|>. That one ended each document that GPT-2 was trained on. When a model writes it, the
# text is over; in place of an empty prompt it means "begin a new text". Merging never crosses the
# border of a word, or "dog.", "dog!" and "dog?" would each become a token. "I'd say 42!" is cut
# into  "I"  "'d"  " say"  " 42"  "!"  (GPT-2 paper, section 2.2; src/encoder.py).
END_OF_TEXT = "<|endoftext|>"
WORDS = (  # a regular expression; \p{L} is any letter, \p{N} any digit
    r"'(?:s|t|re|ve|m|ll|d)|"  # the ends of it's, don't, we're, I've, I'm, we'll, I'd
    r" ?\p{L}+| ?\p{N}+|"  # letters or digits, with the space before them
    r" ?[^\s\p{L}\p{N}]+|"  # other signs
    r"\s+(?!\S)|\s+"  # spaces, but for the last one before a word: it goes with the word
)


def train_bpe(text, vocab_size):
    """Learn {token as bytes: its rank}: the 256 bytes, then merged pairs, vocab_size in all.
    Fewer if the text has no more pairs; below 256 is a UserError. An example is the text " hug hug
    hugs pug", with the words " hug" (twice), " hugs" and " pug":

        the most frequent pair   u g, 4 times       is token 256, "ug"      the words are then
        then                     space h, 3 times   is token 257, " h"      " h" "ug", " " p "ug"
        then                     " h" "ug", 3       is token 258, " hug"    " hug", " " p "ug"

    A new text is cut likewise, into words and bytes, and in each word the pair that was learned
    first is merged first: " hugging" becomes " hug" g i n g. Source: Sennrich et al. 2016, "Neural
    Machine Translation of Rare Words with Subword Units", algorithm 1."""
    if vocab_size < 256:
        raise UserError(f"a vocabulary of {vocab_size} tokens can't hold the 256 bytes")
    # Python's re has no \p. A \w that is no digit and no _ is a letter here (½ counts as one, too).
    pattern = WORDS.replace(r"[^\s\p{L}\p{N}]", r"(?:[^\s\w]|_)")
    pattern = pattern.replace(r"\p{L}", r"[^\W\d_]").replace(r"\p{N}", r"\d")
    words = collections.Counter()  # {a word as a tuple of tokens: how often it occurs}
    for word in re.findall(pattern, text):
        words[tuple(bytes([byte]) for byte in word.encode("utf-8"))] += 1
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):  # each token with the next
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=pairs.get)  # of equally frequent ones, the first in the text
        ranks.setdefault(best[0] + best[1], len(ranks))  # "abc" may be there, from other pairs
        words = {merge_pair(word, best): count for word, count in words.items()}
    return ranks


def merge_pair(word, pair):
    """The tokens of a word, with each occurrence of the pair made one: h u g -> h ug."""
    merged = [word[0]]
    for token in word[1:]:
        if (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


def load_tokenizer(name=None, text=None):
    """GPT-2's tokenizer (name "gpt2"), or one of N tokens that is learned from the text (name N).
    tiktoken downloads GPT-2's vocabulary when it is first used. Where that fails and no name was
    given, 1,024 tokens are learned from the text, and a line says so. Else it is a UserError."""
    if name in (None, "gpt2"):
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or not the file that was expected
            problem = f"GPT-2's vocabulary can't be downloaded ({type(error).__name__})"
        if name == "gpt2" or text is None:
            raise UserError(f"{problem}; go online, or set TIKTOKEN_CACHE_DIR to where it is")
        show(f"{problem}; 1,024 tokens are learned from the text instead")
        name = 1024
    if text is None or not str(name).isdecimal() or int(name) < 257:
        raise UserError(f"--tokenizer is {name}; it must be gpt2 or, for a text, 257 or more")
    return make_tokenizer(train_bpe(text, int(name) - 1))


# A window is context_length tokens of the text, the input, and the same moved on by one, the
# target: at each position, the token that comes next. With a context of 4 and a stride of 2, the
# distance from one window to the next, the first two windows are
#     text               I     HAD      always    thought   Jack     Gis     burn
#     window 0, input    I     HAD      always    thought
#               target   HAD   always   thought   Jack
#     window 1, input                   always    thought   Jack     Gis
#               target                  thought   Jack      Gis      burn
#
# When the stride is below the context, windows overlap, and tokens are learned at more than one
# position. Else each is learned at one position only, with one and the same text before it.
class SlidingWindows(Dataset):
    """Item i is (input, target), each int64 (context_length,), from token i * stride on.
    tokens: a tensor, an array or a numpy.memmap, of which only the item's part is read."""

    def __init__(self, tokens, context_length, stride):
        self.tokens = tokens
        self.context_length = context_length
        self.stride = stride

    def __len__(self):
        # The -1 is for the last target. 1,000 tokens, context 64, stride 32: 935 // 32 + 1 = 30.
        return max(0, (len(self.tokens) - self.context_length - 1) // self.stride + 1)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = i * self.stride
        window = np.asarray(self.tokens[start : start + self.context_length + 1]).astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


# ==================================================================================================
# 5 Training
# All that a GPT knows, it has learned by repeating five lines, each time with another batch:
#
#     loss = cross_entropy(model(inputs), targets)   forward: how badly does it predict this batch?
#     loss.backward()                                the gradient: how would a small change of each
#                                                    parameter change the loss?
#     clip_grad_norm_(model.parameters(), 1.0)       shorten the gradient if it is unusually long
#     optimizer.step()                               move each parameter a bit against its gradient
#     optimizer.zero_grad()                          forget the gradient
#
# The optimizer is AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"). For
# each parameter it keeps two numbers: the running mean of its gradients, and that of their squares.
# A step moves the parameter by the learning rate times the first, divided by the root of the
# second. So each moves by about the learning rate, whether its gradients are large or tiny, and one
# whose gradients keep changing sign hardly moves. Weight decay, the W, also pulls matrices and
# embeddings towards 0 in each step: a weight stays large only if the data keeps asking for it.
# Biases and LayerNorms' weights are not decayed: they are too few to learn a text by heart with,
# and a LayerNorm with weights near 0 would hand on nothing but its bias.
def make_optimizer(model, weight_decay):
    """AdamW. Its means are running means: in each step, mean = beta mean + (1 - beta) new number.
    With betas 0.9 and 0.95, about the last 10 and 20 steps count. fused: PyTorch's fast version.
    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix B."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def learning_rate(step, options):
    """The learning rate of step 1, 2, ..., options.steps. Source: Brown et al. 2020, appendix B.
    In the first --warmup steps it rises evenly, from --learning-rate / --warmup to --learning-rate:
    AdamW's means rest on few gradients then, and full steps would go astray. Then it falls along
    half a cosine to a tenth: large steps get near a minimum of the loss, small ones settle."""
    if step <= options.warmup:
        return options.learning_rate * step / options.warmup
    done = (step - options.warmup) / (options.steps - options.warmup)  # 1 in the last step
    cosine = (1 + math.cos(math.pi * done)) / 2  # falls from 1 to 0
    return options.learning_rate * (0.1 + 0.9 * cosine)


# Clipping. An unusual batch can have a gradient many times as long as others, which would rule
# AdamW's means for many steps. One whose norm, the root of the sum of its squares, exceeds --clip
# is scaled down to it (Pascanu 2013, "On the difficulty of training recurrent neural networks").
#
# Accumulation. backward() adds to the gradients that are there. So a batch that the memory can't
# hold is read in micro-batches: with each loss divided by their number, the gradients add up to
# that of the whole batch. --batch-size 4 --accumulate 2 takes the steps of --batch-size 8, but for
# dropout, with half the memory for what forward keeps, in somewhat more time.
#
# 16 bits. GPUs multiply 16-bit numbers many times as fast as 32-bit ones. Under autocast, PyTorch
# rounds what goes into matrix products and what comes out to 16 bits; LayerNorms, the stream, the
# loss, parameters, their gradients and AdamW's means stay in float32 (Micikevicius et al. 2018,
# "Mixed Precision Training"). bfloat16 has the range of float32 with fewer digits. float16 has more
# digits than bfloat16 but a smaller range, and the gradients that backward hands from one product
# to the one before are float16, too: below 3e-8 they would become 0. So a scaler multiplies the
# loss, and with it every gradient, by a large number and divides the parameters' gradients by it
# before clipping. If one is infinite, the scaler leaves out the step and halves its number.
#
# Several processes, one for each GPU, have the same model and optimizer and read windows of their
# own (`torchrun --nproc_per_node=2 gpt.py train` starts two). In the last backward of a step,
# DistributedDataParallel replaces their gradients by the mean, so that their models stay the same.
RANK = int(os.environ.get("RANK", "0"))  # torchrun numbers the processes from 0
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # and says how many there are


def training_step(model, batches, optimizer, scaler, autocast, clip):
    """One step of the optimizer, on one or more micro-batches -> (loss, norm of the gradient)."""
    total = 0.0
    for number, (inputs, targets) in enumerate(batches, start=1):
        model.require_backward_grad_sync = number == len(batches)  # for several processes
        with autocast:
            loss = cross_entropy(model(inputs), targets) / len(batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)  # the sum over all processes
    return total.item() / WORLD_SIZE, norm.item()


def draw_batches(windows, step, options, model):
    """The windows that a step reads, as micro-batches; it also seeds the dropout of the step.
    Both depend on the options and the step alone, so a resumed run draws what one that was never
    stopped draws. Windows are drawn with replacement. Of N processes, each reads every N-th."""
    draw = np.random.default_rng((options.seed, step))
    count = options.batch_size * options.accumulate * WORLD_SIZE
    numbers = draw.integers(len(windows), size=count)[RANK::WORLD_SIZE]
    torch.manual_seed(int(draw.integers(2**62)) + RANK)  # for dropout
    return read_batches(windows, numbers, options.batch_size, model=model)


# Time. For each token, each of N weights takes part in one multiplication and one addition: 2
# operations. backward does that twice more, for the gradients of the weight and of its input: 6 N
# in all. In each layer, attention adds 2 T C operations for a token's scores, as many for the mean
# of the values, and twice that in backward: 12 n_layer T C. For 124M with T = 1,024 this makes 0.75
# and 0.11 billion operations a token: most are spent on the weights.
#
# Memory. A parameter takes 16 bytes: itself, its gradient, and AdamW's two numbers, 2 GB in all for
# 124M. The rest is what forward keeps for backward, mostly in proportion to B T: the logits alone,
# in float32, are 4 B T V bytes, 206 MB for a window of 1,024 tokens.
def train(options, run=None):
    """Train a GPT and return it. options: those of the command line (section 8); run: (model,
    tokenizer, state) of resumed_run(), or None for a new run. A user's mistake is a UserError."""
    device, dtype = choose_device(options)
    set_up_cpu()
    if run is None:
        run = new_run(options)
    model, tokenizer, state = run
    place(model, device, torch.float32).train()
    windows, validation = read_data(options, tokenizer, model)
    optimizer = make_optimizer(model, options.weight_decay)
    if state["optimizer"]:  # the means of a resumed run; settings may have changed since
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]})
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    learner = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if options.compile:
        learner = torch.compile(learner)
    windows_per_step = options.batch_size * options.accumulate * WORLD_SIZE
    tokens = windows_per_step * windows.context_length  # in a step
    out = Path(options.out)
    log = open_log(out, state["step"]) if RANK == 0 else None

    for step in range(state["step"] + 1, options.steps + 1):
        started = time.perf_counter()
        batches = draw_batches(windows, step, options, model=model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss, norm = training_step(
            learner, batches, optimizer, scaler=scaler, autocast=autocast, clip=options.clip
        )
        # The scaler mends an infinite gradient by halving its number, in vain once that is below 1.
        norm_is_fine = math.isfinite(norm) or (scaler.is_enabled() and scaler.get_scale() >= 1)
        if not math.isfinite(loss) or not norm_is_fine:
            raise UserError(f"step {step}: loss {loss}, gradient {norm}; lower --learning-rate")
        if RANK > 0:
            continue  # the first process does the rest; the others wait for it in their next step
        seconds = time.perf_counter() - started
        last = step == options.steps
        val_loss = None
        if validation and (last or step % options.eval_every == 0):
            val_loss = evaluate(model, validation, autocast)
            if val_loss < state["best_val_loss"]:  # best on unseen text: before learning by heart
                state["best_val_loss"] = val_loss
                save_checkpoint(out / "best.pt", model, tokenizer)
        report(log, options, step, loss=loss, val_loss=val_loss, tokens=tokens, seconds=seconds)
        if last or step % options.save_every == 0:
            # best.pt is only a model; checkpoint.pt also has the state from which a run can go on.
            state["optimizer"] = optimizer.state_dict()["state"]
            state["scaler"] = scaler.state_dict()
            state.update(step=step, batch=windows_per_step, options=vars(options))
            save_checkpoint(out / "checkpoint.pt", model, tokenizer, training_state=state)
            model.eval()
            write_text(model, tokenizer, options.prompt, max_new_tokens=40, temperature=0)
            model.train()
    if RANK == 0:
        close_log(log, options, state)
    return model.eval()


# ==================================================================================================
# 6 Decoding
# Text drawn by the model's own probabilities has blunders in it: each of thousands of unfit tokens
# is improbable, but together they are drawn now and then. Three settings help. Temperature divides
# the logits. As p is proportional to exp(logit), it raises p to the power 1 / temperature: below 1
# the probable becomes more probable, and 0 stands for taking the most probable token (greedy).
# Top-k keeps the k most probable tokens (Fan et al. 2018, "Hierarchical Neural Story Generation").
# Top-p keeps the most probable ones until their sum reaches p: few where the model is sure, many
# where it is not (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). What is
# kept is divided by its sum. Temperature doesn't change which k tokens are the most probable, but
# it does change the sums that top-p looks at. These should be sums of the probabilities by which
# tokens are really drawn, so temperature comes first. For example:
#     four tokens have the probabilities            0.40  0.30  0.20  0.10
#     temperature 0.5: squared, divided by 0.30     0.53  0.30  0.13  0.03
#     top-k 3: the last is dropped                  0.55  0.31  0.14  0
#     top-p 0.8: one is too few, two have 0.86      0.64  0.36  0     0
def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw the next token of each row: logits (B, V) -> int64 (B,). generator: a torch.Generator.
    If several tokens tie at the k-th place, all of them are kept, as in OpenAI's src/sample.py."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}; it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature < 1e-6:  # 0, or so near that a division by it might overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature  # (B, V)
    if top_k is not None and top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    probabilities = torch.softmax(logits, dim=-1)  # (B, V)
    if top_p is not None and top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True)
        sum_before = ordered.cumsum(dim=-1) - ordered  # of all that are more probable
        ordered = ordered.masked_fill(sum_before >= top_p, 0.0)
        probabilities = probabilities.scatter(-1, tokens, ordered)  # back to the tokens' places
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


# A new token attends to the keys and values of all tokens before it. Thanks to the mask these don't
# depend on later tokens, so they stay what they were: they are kept in a cache, and only the new
# token, one row, goes through the blocks. A query is used once, by its own token, and is not kept.
# The cache takes 2 n_layer C numbers a token: for 124M, in float32, 72 KiB, 72 MiB a full window.
#
# Every new token needs every weight, read from memory for two operations with a single row. So the
# speed of memory bounds decoding, and weights of half the size can double it. In training, a weight
# that was read serves all B T rows of a batch: there the speed of arithmetic is the bound.
class KVCache:
    """The keys and values of `length` tokens, in buffers that are made once.
    They are float32 beside 16-bit weights, too: they are few, and a CPU sums float32 faster."""

    def __init__(self, config, batch_size, length=None, device=None):
        room = length or config.context_length
        shape = (config.n_layer, batch_size, config.n_head, room, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, dtype=torch.float32, device=device)
        self.values = torch.empty(shape, dtype=torch.float32, device=device)
        self.length = 0  # GPT.forward counts it up when all layers have added theirs

    def extend(self, layer, k, v):
        """Append new keys and values (B, H, T, D) of a layer; returns all of them (B, H, S, D)."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise UserError(f"{end} tokens don't fit a cache for {self.keys.shape[3]}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


# A full window has no position for one more token. If only its first token were dropped, all others
# would move to new positions and need new keys and values, once for each new token. So the older
# half is dropped, and the newer half, the new token included, is read afresh at positions 0, 1, ...
# On average a token costs hardly more. [ a b c d e f g h ] + i becomes [ f g h i . . . . ].
def generate(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos=None, seed=None
):
    """Yield the next token of each row, int64 (B,), up to max_new_tokens times.
    prompt: int64 (B, T), of which the newest context_length tokens are read. A row that has
    produced eos, the end-of-text token, goes on with eos; when all rows have, generate ends.
    Without a seed, the text is another one each time."""
    context_length = model.config.context_length
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise UserError(f"the prompt is {tuple(prompt.shape)}; it must be (B, T), not empty")
    generator = torch.Generator(prompt.device)
    generator.seed()  # at random
    if seed is not None:
        generator.manual_seed(seed)
    window = prompt[:, -context_length:]  # (B, T)
    room = min(context_length, window.shape[1] + max_new_tokens)
    cache = KVCache(model.config, len(prompt), length=room, device=prompt.device)
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            if window.shape[1] > context_length:
                window = window[:, -max(1, context_length // 2) :]
                cache.length = 0
            unread = window[:, cache.length :]  # the prompt at first, later the newest token
            logits = model(unread, cache, last_only=True)[:, -1]  # (B, V)
            if not logits.sum(dtype=torch.float32).isfinite():  # finite if all of them are
                raise UserError("the model's logits are not finite: its weights are damaged")
            token = sample_token(logits, temperature, top_k=top_k, top_p=top_p, generator=generator)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended = ended | (token == eos)
            window = torch.cat([window, token.unsqueeze(1)], dim=1)
        yield token
        if ended.all():
            return


# ==================================================================================================
# 7 GPT-2 weights
# OpenAI published GPT-2 as a checkpoint of TensorFlow. Its large file is nothing but the numbers of
# all variables, float32, without a header or a gap, in the alphabetical order of their names:
#     model/h0/attn/c_attn/b   model/h0/attn/c_attn/w   ...   model/h0/mlp/c_proj/w
#     model/h1/...   model/h10/...   model/h11/...   model/h2/...   ...   model/h9/...
#     model/ln_f/b   model/ln_f/g   model/wpe   model/wte
# So block 1 stands between model/h0/mlp/c_proj/w and model/h10/attn/c_attn/b. There is nothing for
# the output head, which is tied to model/wte. The file is mapped: tensors are views of it, and the
# system reads a part from the disk when that is first used. Loading copies and computes nothing,
# since OpenAI's matrices differ from ours only in how they are looked at:
#     nn.Linear             x Wᵀ + b     with W (out, in)
#     OpenAI's conv1d()     x w + b      with w (in, out)
# So W is wᵀ, and .t() gives it without moving a number: a view with rows and columns exchanged.
# c_attn is query, key and value side by side, each a third of the columns.
GPT2_DATA = "model.ckpt.data-00000-of-00001"
GPT2_LAYERS = {  # in each block: our name and OpenAI's
    "attention.projection": "attn/c_proj",
    "feed_forward.expand": "mlp/c_fc",
    "feed_forward.projection": "mlp/c_proj",
}


def map_gpt2(path, config):
    """{variable: tensor}, views of OpenAI's file. UserError if it hasn't the length that the shapes
    of all variables give. The names are those above without "model/"; see src/model.py."""
    C = config.n_embd
    shapes = {"wte": (config.vocab_size, C), "wpe": (config.context_length, C)}
    shapes |= {"ln_f/g": (C,), "ln_f/b": (C,)}  # g, the gain, is the weight of a LayerNorm
    for n in range(config.n_layer):
        shapes |= {f"h{n}/ln_1/g": (C,), f"h{n}/ln_1/b": (C,)}
        shapes |= {f"h{n}/attn/c_attn/w": (C, 3 * C), f"h{n}/attn/c_attn/b": (3 * C,)}
        shapes |= {f"h{n}/attn/c_proj/w": (C, C), f"h{n}/attn/c_proj/b": (C,)}
        shapes |= {f"h{n}/ln_2/g": (C,), f"h{n}/ln_2/b": (C,)}
        shapes |= {f"h{n}/mlp/c_fc/w": (C, 4 * C), f"h{n}/mlp/c_fc/b": (4 * C,)}
        shapes |= {f"h{n}/mlp/c_proj/w": (4 * C, C), f"h{n}/mlp/c_proj/b": (C,)}
    length = 4 * sum(math.prod(shape) for shape in shapes.values())  # in bytes
    if path.stat().st_size != length:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, not {length:,}; delete it")
    numbers = torch.from_numpy(np.memmap(path, dtype="<f4", mode="c"))  # the file isn't changed
    variables = {}
    start = 0
    for name, shape in sorted(shapes.items()):
        variables[name] = numbers[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
    return variables


def load_gpt2(folder, **changes):
    """OpenAI's GPT, from a folder with hparams.json and model.ckpt.data-00000-of-00001.
    changes: fields of its GPTConfig to be replaced. A wrong file raises UserError."""
    config = replace(read_hparams(Path(folder, "hparams.json")), **changes)
    variables = map_gpt2(Path(folder, GPT2_DATA), config)
    weights = {"token_embedding": variables["wte"], "position_embedding": variables["wpe"]}
    weights |= {"final_norm.weight": variables["ln_f/g"], "final_norm.bias": variables["ln_f/b"]}
    for n in range(config.n_layer):
        w = variables[f"h{n}/attn/c_attn/w"].chunk(3, dim=1)  # (C, 3C) -> 3 of (C, C)
        b = variables[f"h{n}/attn/c_attn/b"].chunk(3)
        for i, name in enumerate(("query", "key", "value")):
            weights[f"blocks.{n}.attention.{name}.weight"] = w[i].t()
            weights[f"blocks.{n}.attention.{name}.bias"] = b[i]
        for ours, theirs in GPT2_LAYERS.items():
            weights[f"blocks.{n}.{ours}.weight"] = variables[f"h{n}/{theirs}/w"].t()
            weights[f"blocks.{n}.{ours}.bias"] = variables[f"h{n}/{theirs}/b"]
        for i in (1, 2):
            weights[f"blocks.{n}.norm_{i}.weight"] = variables[f"h{n}/ln_{i}/g"]
            weights[f"blocks.{n}.norm_{i}.bias"] = variables[f"h{n}/ln_{i}/b"]
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)  # these tensors themselves, not copies
    return model.eval()


# ==================================================================================================
# 8 Plumbing: files, devices, options
STORY = str(Path(__file__).with_name("the-verdict.txt"))
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # RANK within its machine
FORMAT = 2  # of checkpoints
DEVICES = ["auto", "cpu", "cuda", "mps"]
DTYPES = ["auto", "float32", "bfloat16", "float16"]
SHAPE_OPTIONS = ["context_length", "n_layer", "n_head", "n_embd"]
FIXED_OPTIONS = [*SHAPE_OPTIONS, "size", "gpt2", "gpt2_folder", "gpt2_url", "tokenizer", "dropout"]
FIXED_OPTIONS += ["from_scratch", "seed"]  # what a resumed run has to keep
M_TRIM_THRESHOLD = -1  # these two are from glibc's malloc.h
M_MMAP_THRESHOLD = -3


def show(line, end="\n"):
    """Write a line to standard error. If it ends in a carriage return, the next line is written
    over it: in a terminal it is cut to the width, and it is left out of a file."""
    in_terminal = sys.stderr.isatty()
    width = shutil.get_terminal_size().columns - 1 if in_terminal else 0
    if end == "\r":
        if not in_terminal:
            return
        line = line[:width]
    print(line.ljust(width), end=end, file=sys.stderr, flush=True)


def make_tokenizer(ranks):
    """The tiktoken.Encoding of {token as bytes: number}, and of <|endoftext|> as one more."""
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("gpt.py", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def save_checkpoint(path, model, tokenizer, training_state=None):
    """Write a model with its tokenizer. If a kill or a full disk interrupts, the old file stays."""
    tokens = [tokenizer.decode_single_token_bytes(n).hex() for n in range(tokenizer.eot_token)]
    content = {"format": FORMAT, "config": asdict(model.config), "weights": model.state_dict()}
    content |= {"tokenizer": " ".join(tokens), "training_state": training_state}
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # it must be on the disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"can't write {path} ({error}); what was there before still is") from error


def load_checkpoint(path, mapped=True):
    """(model, tokenizer, training_state or None); a damaged or foreign file is a UserError.
    mapped: read its parts when they are used. Such a file must not be replaced meanwhile."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}; train a model first, or name another file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums, which torch.load doesn't do
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        if damaged or content["format"] != FORMAT:
            raise ValueError(damaged or "another format")
        config = content["config"]
        weights = content["weights"]
        tokens = content["tokenizer"].split()
    except Exception as error:  # whatever zipfile and torch.load make of a wrong file
        raise UserError(f"{path} is damaged, or no checkpoint of gpt.py ({error!r})") from error
    with torch.device("meta"):
        model = GPT(GPTConfig(**config))  # a bug in GPT is not the file's fault
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} don't fit its config ({error})") from error
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokens)}
    return model.eval(), make_tokenizer(ranks), content["training_state"]


def read_hparams(path):
    """The GPTConfig that OpenAI's hparams.json describes."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shape = {name: found[name] for name in ("n_embd", "n_head", "n_layer")}
        return GPTConfig(vocab_size=found["n_vocab"], context_length=found["n_ctx"], **shape)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not OpenAI's ({error!r}); delete it") from error


def download_gpt2(size, folder, url):
    """Fetch OpenAI's two files, unless they are in the folder. What isn't right is not kept."""
    names = ("hparams.json", GPT2_DATA)
    if all(Path(folder, name).exists() for name in names):
        return
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        try:
            for name in names:
                source = f"{url}/{size}/{name}"
                show(f"downloading {source}")
                bar = sys.stderr.isatty()
                torch.hub.download_url_to_file(source, f"{new}/{name}", progress=bar)
            load_gpt2(new)  # a UserError if they are not what they should be
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{url}/{size}: {error}; check the address, or try again") from error
        for name in names:
            os.replace(f"{new}/{name}", Path(folder, name))


def open_gpt2(options, **changes):
    """OpenAI's model and tokenizer, downloaded if need be."""
    tokenizer = load_tokenizer("gpt2")
    folder = Path(options.gpt2_folder, options.gpt2)
    download_gpt2(options.gpt2, folder, options.gpt2_url)
    return load_gpt2(folder, **changes), tokenizer


def choose_device(options):
    """The (torch.device, torch.dtype) that --device and --dtype ask for."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    best = "cpu" if accelerator is None else accelerator.type
    name = best if options.device == "auto" else options.device
    if name not in ("cpu", best):
        raise UserError(f"--device is {name}; this machine has only {best}")
    dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
    if name == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        if options.dtype == "auto":
            # Training wants bfloat16's range, sampling float16's digits for logits of -30 to -120.
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            trains = options.command == "train"
            dtype = torch.bfloat16 if trains and has_bfloat16 else torch.float16
    return torch.device(name), dtype


def set_up_cpu():
    """Make PyTorch quicker on a CPU; results change by rounding only. Call it before a model runs.
    glibc, the C library, gives large buffers back to the system and fetches them anew in each step:
    it is told to keep them. PyTorch has two libraries for products of float32, and takes the faster
    one, oneDNN, only if rounding to bfloat16 is allowed. Most processors don't round even then; one
    that does shows it in a product with the identity matrix, and is set back."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        # In bytes. An older glibc takes at most the first of these, and refuses the second.
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    x = torch.rand(512, 512)
    if not torch.equal(x @ torch.eye(512), x):
        products.fp32_precision = before


def attention_of_one(q, k, v):
    """attention() of one query, T = 1. On a CPU, this is quicker than two products of matrices."""
    scores = (q * k).sum(dim=-1) / math.sqrt(q.shape[-1])  # (B, H, S)
    weights = torch.softmax(scores, dim=-1)  # it may see all tokens: no mask
    return (weights.unsqueeze(-1) * v).sum(dim=-2, keepdim=True)  # (B, H, 1, D)


class Linear(nn.Linear):
    """PyTorch's nn.Linear, with its product by linear()."""

    def forward(self, x):
        return linear(x, self.weight, bias=self.bias)


def linear(x, weight, bias=None):
    """F.linear(), x Wᵀ + b, in ways that are quicker on many CPUs: (..., m) -> (..., n)."""
    single = x.numel() == x.shape[-1]
    if x.is_cpu and single and weight.dtype == torch.float32:
        y = multiply_in_parts(x.flatten(), weight).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    if x.is_cpu and not single and weight.dtype.itemsize == 2:
        # Many CPUs are slow at products of 16-bit matrices. Making W float32 takes little time.
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)
    return F.linear(x, weight, bias)


def multiply_in_parts(x, weight):
    """x Wᵀ for a single token, x (m,) -> (n,), with all cores at work.
    Most of the time goes into reading W, and PyTorch may leave that to one core. So W is cut into a
    part for each core, the way it lies in memory: row by row, or column by column as OpenAI's."""
    n, m = weight.shape
    cores = torch.get_num_threads()
    if weight.is_contiguous():  # row by row: each core makes a part of the n results
        size = n // cores
        parts = weight[: cores * size].view(cores, size, m).transpose(1, 2)
        y = torch.bmm(x.expand(cores, 1, m), parts).flatten()  # for each core, (1, m) @ (m, size)
        if len(y) < n:
            y = torch.cat([y, weight[len(y) :] @ x])  # the rows that are left over
        return y
    cores = math.gcd(cores, m)  # column by column: each core multiplies by a part of x
    parts = weight.t().view(cores, m // cores, n)
    y = torch.bmm(x.view(cores, 1, -1), parts)  # for each core, (1, m / cores) @ (m / cores, n)
    return y.sum(dim=0).flatten()


def place(model, device, dtype):
    """Move a model, and lay its matrices row by row, as training and 16-bit products need them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype).contiguous()
    return model


def open_data(path):
    """The text of a file, or the tokens of a .bin file, which is mapped and not read at once."""
    try:
        if path.endswith(".bin"):
            return np.memmap(path, dtype="<u2", mode="r")
        return Path(path).read_text(encoding="utf-8")
    except ValueError as error:  # an incomplete letter or token
        problem = f"{path} is neither a text in UTF-8 nor, as .bin, tokens of two bytes"
        raise UserError(f"{problem} ({error}); convert it first") from error


def read_data(options, tokenizer, model):
    """The SlidingWindows to train on, and batches from the end of the data, for validation."""
    tokens = open_data(options.data)
    if isinstance(tokens, str):
        tokens = tokenizer.encode_to_numpy(tokens, allowed_special="all")
    val_count = int(len(tokens) * options.val_fraction)
    count = len(tokens) - val_count
    context = options.context_length or model.config.context_length
    stride = options.stride or max(1, context * 3 // 4)
    windows = SlidingWindows(tokens[:count], context, stride)
    if len(windows) == 0:
        raise UserError(f"{options.data} has {count} tokens to train on; it needs {context + 1}")
    val_context = max(1, min(context, val_count - 1))  # a short text has one shorter window
    val_stride = max(val_context, val_count // 64)  # no overlap, and at most about 64 windows
    validation = SlidingWindows(tokens[count:], val_context, val_stride)
    if RANK == 0:
        size = sum(parameter.numel() for parameter in model.parameters())
        show(f"{size:,} parameters learn from {len(windows):,} windows of {windows.context_length}")
    numbers = range(len(validation))
    return windows, read_batches(validation, numbers, options.batch_size, model=model)


def read_batches(windows, numbers, batch_size, model):
    """The windows with these numbers, as batches [(inputs, targets), ...], (B, T) each."""
    device = model.token_embedding.device
    batches = []
    for start in range(0, len(numbers), batch_size):
        pairs = [windows[int(number)] for number in numbers[start : start + batch_size]]
        inputs, targets = default_collate(pairs)  # stacked
        largest = max(inputs.max().item(), targets.max().item())
        if largest >= model.config.vocab_size:
            raise UserError(f"token {largest} of the data is not in the vocabulary of the model")
        batches.append((inputs.to(device), targets.to(device)))
    return batches


@torch.no_grad()
def evaluate(model, batches, autocast):
    """The mean loss of all windows in these batches, without dropout."""
    model.eval()
    total = 0.0
    for inputs, targets in batches:
        with autocast:
            total += cross_entropy(model(inputs), targets).item() * len(inputs)
    model.train()
    return total / sum(len(inputs) for inputs, _ in batches)


def new_run(options):
    """(model, tokenizer, state) of a run that begins, with a new model or with OpenAI's."""
    if Path(options.out, "checkpoint.pt").exists():
        raise UserError(f"{options.out} has a checkpoint.pt; add --resume, or choose another --out")
    if Path(options.out, "best.pt").exists():  # of a run without a checkpoint
        raise UserError(f"{options.out} has a best.pt; move it, or choose another --out")
    state = {"step": 0, "best_val_loss": math.inf, "optimizer": {}, "scaler": {}}
    fields = {"dropout": options.dropout, "fused": not options.from_scratch}
    given = [name for name in SHAPE_OPTIONS if getattr(options, name) is not None]
    shape = {name: getattr(options, name) for name in given}
    if LOCAL_RANK > 0:  # the first process of each machine goes first: it may download
        torch.distributed.barrier()
    if options.gpt2:
        if options.size or options.tokenizer or given not in ([], ["context_length"]):
            raise UserError("--gpt2 has a shape: leave out --size, --n-layer, ..., --tokenizer")
        model, tokenizer = open_gpt2(options, **fields)
    else:
        data = open_data(options.data)
        text = data if isinstance(data, str) else None
        tokenizer_name = options.tokenizer
        if tokenizer_name is None and WORLD_SIZE > 1:
            tokenizer_name = "gpt2"  # one that is offline would learn another
        tokenizer = load_tokenizer(tokenizer_name, text)
        config = SMALL_CONFIG if options.size in (None, "small") else GPT2_CONFIGS[options.size]
        config = replace(config, vocab_size=tokenizer.n_vocab, **shape, **fields)
        torch.manual_seed(options.seed)  # for the parameters
        model = GPT(config)
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        torch.distributed.barrier()
    return model, tokenizer, state


def resumed_run(out, parser, train_parser, argv):
    """(options, run) of the run in a folder: its own options, those that are given again on top."""
    path = Path(out, "checkpoint.pt")
    model, tokenizer, state = load_checkpoint(path, mapped=False)  # since it will be replaced
    if state is None:
        raise UserError(f"{path} has a model only, no run to go on with")
    saved = state["options"]
    train_parser.set_defaults(**saved)
    train_parser.set_defaults(out=out)  # the folder may have been moved
    options = parser.parse_args(argv)
    changed = [name for name in FIXED_OPTIONS if getattr(options, name) != saved[name]]
    if changed:
        raise UserError(f"a resumed run keeps its {', '.join(changed)}; leave that out")
    if options.steps < state["step"]:
        raise UserError(f"--steps is {options.steps}, but {state['step']} were taken already")
    batch = options.batch_size * options.accumulate * WORLD_SIZE
    if batch != state["batch"]:
        product = "--batch-size x --accumulate x processes"
        raise UserError(f"{product} is {batch}; it must stay {state['batch']}")
    return options, (model, tokenizer, state)


def open_log(out, step):
    """out/log.csv, to be continued after the row of this step; later rows are cut off."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "log.csv"
    rows = ["step,train_loss,val_loss,learning_rate,tokens_per_second\n"]
    if step > 0 and path.exists():
        rows = path.read_text().splitlines(keepends=True)[: step + 1]  # a header, then a row a step
    Path(f"{path}.tmp").write_text("".join(rows))
    os.replace(f"{path}.tmp", path)
    return open(path, "a", buffering=1)  # line by line


def close_log(log, options, state):
    """Say at the end of a run where its models are, and what to try."""
    log.close()
    out = options.out
    if state["best_val_loss"] < math.inf:
        show(f"The model that did best on unseen text is {out}/best.pt.")
    show(f"The last one is {out}/checkpoint.pt. Try it:")
    show(f"    python gpt.py sample --checkpoint {out}/checkpoint.pt --temperature 0")


def report(log, options, step, loss, val_loss, tokens, seconds):
    """Log a step that took so many seconds, and show it: now and then, or in a terminal always."""
    speed = tokens / seconds
    val = "" if val_loss is None else f"{val_loss:.9g}"
    log.write(f"{step},{loss:.9g},{val},{learning_rate(step, options):.9g},{speed:.0f}\n")
    line = f"step {step}/{options.steps}  loss {loss:.3f}"
    if val_loss is not None:
        line += f"  val {val_loss:.3f}"
    left = round(seconds * (options.steps - step))
    line += f"  {speed:,.0f} tokens/s  {left // 60}:{left % 60:02} left"
    saved = step % options.save_every == 0
    stays = saved or step in (1, options.steps) or step % options.eval_every == 0
    show(line, end="\n" if stays else "\r")


def write_text(model, tokenizer, text, max_new_tokens, eos=None, **settings):
    """Write a text and its continuation while it is generated; returns the number of tokens.
    A letter of several bytes can be spread over tokens: it is held back until it is complete."""
    prompt = tokenizer.encode(text, allowed_special="all") or [tokenizer.eot_token]
    prompt = torch.tensor([prompt], device=model.token_embedding.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    count = 0
    print(text, end="", flush=True)
    for token in generate(model, prompt, max_new_tokens, eos=eos, **settings):
        if token.item() != eos:
            piece = tokenizer.decode_single_token_bytes(token.item())
            print(decoder.decode(piece), end="", flush=True)
            count += 1
    print(decoder.decode(b"", final=True), flush=True)
    return count


def sample(options):
    """Continue a prompt, on standard output; the figures go to standard error."""
    if options.gpt2 and options.checkpoint:
        raise UserError("leave out --gpt2 or --checkpoint: a sample is from one model")
    if options.gpt2:
        model, tokenizer = open_gpt2(options)
    else:
        model, tokenizer, _ = load_checkpoint(options.checkpoint or "out/checkpoint.pt")
    device, dtype = choose_device(options)
    set_up_cpu()
    if device.type != "cpu" or dtype != torch.float32:  # else the weights stay mapped
        place(model, device, dtype)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    settings = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    settings["eos"] = None if options.ignore_eos else tokenizer.eot_token
    started = time.perf_counter()
    count = 0
    for index in range(options.samples):
        if options.samples > 1:
            print(f"--- sample {index + 1} ---")
        seed = options.seed + index
        count += write_text(
            model, tokenizer, text, max_new_tokens=options.tokens, seed=seed, **settings
        )
    seconds = time.perf_counter() - started
    show(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens per second")


def number(kind, low, high=1e18):
    """The type of an option: an int or a float from low to high."""
    name = "whole number" if kind is int else "number"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low:g} to {high:g}")
        return value

    return convert


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, without the usage."""

    def error(self, message):
        fail(message)


def make_parsers():
    """The parser of the command line, and the part of it that is for `train`."""
    parser = Parser("gpt.py", description="Train a GPT, or let it write.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train a GPT", allow_abbrev=False)
    sample_parser = commands.add_parser("sample", help="continue a text", allow_abbrev=False)
    count = number(int, 1)
    fraction = number(float, 0, 0.99)
    int_from_0 = number(int, 0)
    float_from_0 = number(float, 0)
    above_0 = number(float, 1e-9)
    probability = number(float, 1e-9, 1)

    add = train_parser.add_argument_group("data").add_argument
    add("--data", type=os.path.abspath, default=STORY, help="UTF-8 text, or .bin: uint16 tokens")
    add("--val-fraction", type=fraction, default=0.1, help="share for validation [%(default)s]")
    add("--tokenizer", help="gpt2, or N: learn N tokens from the data [gpt2, offline 1024]")
    add("--stride", type=count, help="tokens from window to window [3/4 of the context]")
    add = train_parser.add_argument_group("model").add_argument
    add("--size", choices=["small", *GPT2_CONFIGS], help="a new model's shape [small]")
    add("--context", dest="context_length", type=count, help="tokens a window [the size's]")
    add("--n-layer", type=count, help="blocks [the size's]")
    add("--n-head", type=count, help="attention heads [the size's]")
    add("--n-embd", type=count, help="channels [the size's]")
    add("--dropout", type=fraction, default=0.0, help="share of numbers set to 0 [%(default)s]")
    add("--from-scratch", action="store_true", help="compute by the hand-written lines")
    add = train_parser.add_argument_group("training").add_argument
    add("--steps", type=count, default=260, help="optimizer steps in all [%(default)s]")
    add("--batch-size", type=count, default=4, help="windows read at once [%(default)s]")
    add("--accumulate", type=count, default=1, help="micro-batches a step [%(default)s]")
    add("--learning-rate", type=float_from_0, default=1.2e-3, help="highest value [%(default)s]")
    add("--warmup", type=int_from_0, default=30, help="steps until it is reached [%(default)s]")
    add("--weight-decay", type=float_from_0, default=0.1, help="pull of weights to 0 [%(default)s]")
    add("--clip", type=above_0, default=1.0, help="longest gradient let through [%(default)s]")
    switch = argparse.BooleanOptionalAction
    add("--compile", action=switch, default=False, help="a slow start, then faster steps")
    add = train_parser.add_argument_group("output").add_argument
    add("--out", default="out", help="folder for checkpoints and log.csv [%(default)s]")
    add("--resume", action="store_true", help="go on from the checkpoint in that folder")
    add("--eval-every", type=count, default=20, help="steps between validations [%(default)s]")
    add("--save-every", type=count, default=100, help="steps between checkpoints [%(default)s]")
    add = sample_parser.add_argument_group("text").add_argument
    add("--checkpoint", help="a model that was trained here [out/checkpoint.pt]")
    add("--tokens", type=count, default=100, help="the most to be added [%(default)s]")
    add("--temperature", type=float_from_0, default=0.8, help="0 is greedy [%(default)s]")
    add("--top-k", type=count, default=50, help="keep the k most probable [%(default)s]")
    add("--top-p", type=probability, default=1.0, help="keep the best of sum p [%(default)s]")
    add("--samples", type=count, default=1, help="how many texts [%(default)s]")
    add("--ignore-eos", action="store_true", help="go on behind <|endoftext|>")
    for command in (train_parser, sample_parser):
        add = command.add_argument_group("GPT-2").add_argument
        add("--gpt2", choices=[*GPT2_CONFIGS], help="take OpenAI's weights of this size")
        add("--gpt2-folder", default="gpt2", help="where they are kept [%(default)s]")
        add("--gpt2-url", default=GPT2_URL, help="where they come from [OpenAI's server]")
        add = command.add_argument_group("other").add_argument
        add("--prompt", default="I HAD always thought", help="to continue (sample: - is stdin)")
        add("--seed", type=int_from_0, default=1, help="for all that is random [%(default)s]")
        add("--device", choices=DEVICES, default="auto", help="where to compute [the fastest]")
        add("--dtype", choices=DTYPES, default="auto", help="[16 bits on cuda, else float32]")
    return parser, train_parser


def run_training(options, parser, train_parser, argv):
    """`train`, in one process or in one of several."""
    earlier = None
    if options.resume:
        options, earlier = resumed_run(options.out, parser, train_parser=train_parser, argv=argv)
    if WORLD_SIZE > 1:  # the others may wait long for the first process, which saves
        torch.distributed.init_process_group(timeout=datetime.timedelta(days=1))
    train(options, earlier)
    if WORLD_SIZE > 1:
        torch.distributed.barrier()
        gc.collect()  # DistributedDataParallel has to go before the group, or may abort at exit
        torch.distributed.destroy_process_group()


def fail(message, status=2):
    """End with one line on standard error, over one that was to be overwritten."""
    show("", end="\r")
    print("gpt.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def main(argv=None):
    """Run a command; SystemExit with status 2 and one line for a mistake that the user can mend."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # to UTF-8, whatever the system's code page
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        parser, train_parser = make_parsers()
        options = parser.parse_args(argv)
        if options.command == "sample":
            sample(options)
        else:
            run_training(options, parser, train_parser=train_parser, argv=argv)
    except BrokenPipeError:
        # Nobody reads our output any more, as after `| head`. What Python still has goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fail("stopped; with --resume a training goes on from its last checkpoint", status=130)
    except (UserError, OSError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        known = "out of memory|not enough memory|allocate|size calculation overflowed"
        if not isinstance(error, MemoryError) and not re.search(known, str(error)):
            raise
        fail(f"the memory is too small ({error}); take a smaller model, context or batch")


if __name__ == "__main__":
    main()
