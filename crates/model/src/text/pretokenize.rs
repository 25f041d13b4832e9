//! How is text cut before byte-pair merging? The patterns behind the names in `tokenizer.ggml.pre`.
//!
//! The names are llama.cpp's (`llama-vocab.cpp`); each pattern is the one in the publisher's `tokenizer.json`. Cutting
//! differently gives other tokens than the model was trained on, so an unknown name is an error.

/// One way to cut.
pub(super) struct Cut {
    /// Applied in turn, each to the pieces that the one before left; matches and what lies between become pieces.
    pub(super) patterns: &'static [&'static str],
    /// A piece that is a token as a whole is not merged up to it.
    pub(super) whole_pieces: bool,
    /// BOS is added unless the file says otherwise.
    pub(super) bos: bool,
    /// Text is brought to Unicode's composed form (NFC) first.
    pub(super) compose: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// What `tokenizer.ggml.pre` values are understood, for the error message.
pub(super) const KNOWN: &str = "default, gpt-2, smollm, starcoder, refact, command-r, codeshell, exaone, llama-bpe, \
     llama3, llama-v3, falcon3, pixtral, smaug-bpe, dbrx, chatglm-bpe, qwen2, deepseek-r1-qwen, stablelm2, tekken, \
     deepseek-v3, deepseek-coder";

const PLAIN: Cut = Cut { patterns: &[GPT2], whole_pieces: false, bos: false, compose: false };

/// The cut of that name; `None` if unknown.
pub(super) fn cut(name: &str) -> Option<Cut> {
    Some(match name {
        "gpt-2" | "olmo" | "mpt" | "jina-es" | "jina-de" | "phi-2" => PLAIN,
        "default" => {
            Cut { patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"], ..PLAIN }
        }
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            Cut { patterns: &[r"\p{N}", GPT2], ..PLAIN }
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
            Cut { patterns: &[LLAMA3], whole_pieces: true, bos: true, ..PLAIN }
        }
        "smaug-bpe" | "dbrx" => Cut { patterns: &[LLAMA3], ..PLAIN },
        "chatglm-bpe" => Cut { patterns: &[LLAMA3], ..PLAIN },
        "qwen2" | "deepseek-r1-qwen" => Cut { patterns: &[QWEN2], compose: true, ..PLAIN },
        "stablelm2" => Cut { patterns: &[QWEN2], ..PLAIN },
        "tekken" => Cut { patterns: &[TEKKEN], whole_pieces: true, bos: true, ..PLAIN },
        "deepseek-v3" => Cut { patterns: &[r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3], ..PLAIN },
        "deepseek-coder" => Cut {
            patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
            ..PLAIN
        },
        _ => return None,
    })
}
