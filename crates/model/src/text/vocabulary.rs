//! A `tokenizers` object from GGUF metadata (`tokenizer.ggml.*`).
//!
//! Two kinds: `gpt2`, byte-level byte-pair encoding with its merges listed, and `llama`, SentencePiece's byte-pair
//! encoding with byte fallback, whose merges follow from the scores.

use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Cuts;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::pretokenize::{self, Cut};
use super::tokenizer_error;
use crate::ModelError;
use crate::config::gguf::{Metadata, missing};

/// Ids that the metadata names.
pub(super) struct Named {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) ends: Vec<u32>, // eos included
}

// Token types of the GGUF specification that matter here.
const UNKNOWN: usize = 2;
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

pub(super) fn read(metadata: &Metadata<'_>) -> Result<(Tokenizer, Named), ModelError> {
    let key = "tokenizer.ggml.model";
    let tokens = texts(metadata, "tokenizer.ggml.tokens")?;
    let types = types(metadata, tokens.len())?;
    let named = named(metadata, tokens.len())?;
    let (mut tokenizer, bos) = match metadata.text(key)?.ok_or_else(|| missing(key))? {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => (sentence_piece(metadata, &tokens, &types)?, true),
        other => return Err(wrong(format!("kind {other:?} is not supported, wanted gpt2 or llama"))),
    };
    add_tokens(&mut tokenizer, &tokens, &types)?;
    let bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(bos);
    let eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    surround(&mut tokenizer, &tokens, named.bos.filter(|_| bos), named.eos.filter(|_| eos))?;
    Ok((tokenizer, named))
}

fn wrong(what: impl Into<String>) -> ModelError {
    ModelError::Tokenizer { what: what.into() }
}

/// Byte-level byte-pair encoding, and whether it begins a text with BOS by default.
fn byte_level(metadata: &Metadata<'_>, tokens: &[&str]) -> Result<(Tokenizer, bool), ModelError> {
    let name = metadata.text("tokenizer.ggml.pre")?.unwrap_or_else(|| {
        tracing::warn!("the file does not say how to cut text (tokenizer.ggml.pre): using \"default\"");
        "default"
    });
    let cut = pretokenize::cut(name).ok_or_else(|| {
        wrong(format!("tokenizer.ggml.pre {name:?} is not supported, wanted one of {}", pretokenize::KNOWN))
    })?;
    let merges = texts(metadata, "tokenizer.ggml.merges")?;
    let merges = merges.iter().map(|merge| {
        // Neither half is empty, so that the first letter may be the separator itself.
        let space = merge.char_indices().skip(1).find(|&(_, letter)| letter == ' ').map(|(at, _)| at);
        let (left, right) =
            merge.split_at(space.ok_or_else(|| wrong(format!("merge {merge:?} has no space")))?);
        Ok((left.to_owned(), right[1..].to_owned()))
    });
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(tokens), merges.collect::<Result<_, ModelError>>()?)
        .ignore_merges(cut.whole_pieces)
        .build()
        .map_err(|e| tokenizer_error(&e))?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(cuts(&cut)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    if cut.compose {
        tokenizer.with_normalizer(Some(NFC)).map_err(|e| tokenizer_error(&e))?;
    }
    Ok((tokenizer, cut.bos))
}

fn cuts(cut: &Cut) -> Result<Cuts, ModelError> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in cut.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split =
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| tokenizer_error(&e))?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Cuts::new(steps))
}

/// SentencePiece's byte-pair encoding.
fn sentence_piece(
    metadata: &Metadata<'_>,
    tokens: &[&str],
    types: &[usize],
) -> Result<Tokenizer, ModelError> {
    let scores = metadata.list("tokenizer.ggml.scores")?.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
    let scores: Vec<f32> = scores.iter().map_while(|score| score.to_f32().ok()).collect();
    if scores.len() != tokens.len() {
        return Err(wrong(format!("{} scores for {} tokens", scores.len(), tokens.len())));
    }
    let ids = vocabulary(tokens);
    let merges = merges_by_score(tokens, &scores, &ids);
    let mut builder = BPE::builder().vocab_and_merges(ids, merges).fuse_unk(true).byte_fallback(true);
    if let Some(unknown) = types.iter().position(|&kind| kind == UNKNOWN) {
        builder = builder.unk_token(tokens[unknown].to_owned());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(|e| tokenizer_error(&e))?);

    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|e| tokenizer_error(&e));
    let mut steps = Vec::new();
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    if prefix {
        steps.push(Prepend::new("▁".to_owned()).into());
    }
    steps.push(replace(" ", "▁")?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(|e| tokenizer_error(&e))?;
    let mut steps = vec![replace("▁", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(steps)));
    Ok(tokenizer)
}

/// Every way to put a token together from two others, best score first: SentencePiece merges the pair whose result
/// scores best, so a merge's rank is its result's. Of one token's pairs, the one of the lower ids goes first.
fn merges_by_score(tokens: &[&str], scores: &[f32], ids: &Vocab) -> Vec<(String, String)> {
    const LONGEST: usize = 256; // bytes; bounds the work on a damaged file
    let mut found = Vec::new();
    for (token, score) in tokens.iter().zip(scores).filter(|(token, _)| token.len() <= LONGEST) {
        let first = found.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                found.push((*score, (l, r)));
            }
        }
        found[first..].sort_by_key(|&(_, pair)| pair);
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0)); // stable
    let text = |id: u32| tokens[id as usize].to_owned();
    found.into_iter().map(|(_, (left, right))| (text(left), text(right))).collect()
}

/// Control tokens and those their publisher added are matched in the text before anything else.
fn add_tokens(tokenizer: &mut Tokenizer, tokens: &[&str], types: &[usize]) -> Result<(), ModelError> {
    let added = tokens.iter().zip(types).filter_map(|(token, &kind)| match kind {
        CONTROL | UNKNOWN => Some(AddedToken::from(*token, true).normalized(false)),
        USER_DEFINED => Some(AddedToken::from(*token, false).normalized(false)),
        _ => None,
    });
    tokenizer.add_tokens(added.collect::<Vec<_>>()).map(|_| ()).map_err(|e| tokenizer_error(&e))
}

/// Begins and ends a bare text with special tokens.
fn surround(
    tokenizer: &mut Tokenizer,
    tokens: &[&str],
    bos: Option<u32>,
    eos: Option<u32>,
) -> Result<(), ModelError> {
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let named = |id: Option<u32>| id.map(|id| (tokens[id as usize].to_owned(), id));
    let (bos, eos) = (named(bos), named(eos));
    let mut pieces = vec!["$A".to_owned()];
    if let Some((token, _)) = &bos {
        pieces.insert(0, token.clone());
    }
    pieces.extend(eos.iter().map(|(token, _)| token.clone()));
    let around = TemplateProcessing::builder()
        .try_single(pieces)
        .map_err(wrong)?
        .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
        .build()
        .map_err(|e| wrong(e.to_string()))?;
    tokenizer.with_post_processor(Some(around));
    Ok(())
}

fn texts<'a>(metadata: &Metadata<'a>, key: &str) -> Result<Vec<&'a str>, ModelError> {
    let list = metadata.list(key)?.ok_or_else(|| missing(key))?;
    let text = |value: &'a Value| match value {
        Value::String(text) => Ok(text.as_str()),
        _ => Err(wrong(format!("{key} holds something that is not text"))),
    };
    list.iter().map(text).collect()
}

/// `[tokens]`; a file without types has only normal tokens (type 1).
fn types(metadata: &Metadata<'_>, tokens: usize) -> Result<Vec<usize>, ModelError> {
    let key = "tokenizer.ggml.token_type";
    let Some(list) = metadata.list(key)? else { return Ok(vec![1; tokens]) };
    let number = |value: &Value| match *value {
        Value::I32(kind) => usize::try_from(kind).ok(),
        Value::U32(kind) => usize::try_from(kind).ok(),
        _ => None,
    };
    let types: Vec<usize> = list.iter().map_while(number).collect();
    if types.len() == tokens {
        Ok(types)
    } else {
        Err(wrong(format!("{} types for {tokens} tokens", types.len())))
    }
}

fn named(metadata: &Metadata<'_>, tokens: usize) -> Result<Named, ModelError> {
    let id = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match metadata.count(&key)? {
            Some(id) if id < tokens => Ok(Some(id as u32)),
            Some(id) => Err(wrong(format!("{key} is {id} in a vocabulary of {tokens}"))),
            None => Ok(None),
        }
    };
    let eos = id("eos")?;
    let ends = [eos, id("eot")?, id("eom")?].into_iter().flatten().collect();
    Ok(Named { bos: id("bos")?, eos, ends })
}

/// Token to id; of equal tokens the first counts.
fn vocabulary(tokens: &[&str]) -> Vocab {
    let mut ids = Vocab::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        ids.entry((*token).to_owned()).or_insert(id as u32);
    }
    if ids.len() < tokens.len() {
        tracing::warn!(
            repeated = tokens.len() - ids.len(),
            "the vocabulary repeats tokens; the first of each is used"
        );
    }
    ids
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde_json::Value as Json;

    use super::*;

    /// A vocabulary made by SentencePiece itself, with the ids it gave (`scripts/make_sentencepiece_ids.py`).
    fn sentence_piece_file() -> (HashMap<String, Value>, Json) {
        let file: Json = serde_json::from_str(include_str!("../../tests/data/sentencepiece.json")).unwrap();
        let list = |key: &str, read: fn(&Json) -> Value| {
            Value::Array(file[key].as_array().unwrap().iter().map(read).collect())
        };
        let metadata = HashMap::from([
            ("tokenizer.ggml.model".to_owned(), Value::String("llama".to_owned())),
            (
                "tokenizer.ggml.tokens".to_owned(),
                list("tokens", |x| Value::String(x.as_str().unwrap().to_owned())),
            ),
            ("tokenizer.ggml.scores".to_owned(), list("scores", |x| Value::F32(x.as_f64().unwrap() as f32))),
            (
                "tokenizer.ggml.token_type".to_owned(),
                list("types", |x| Value::I32(x.as_i64().unwrap() as i32)),
            ),
            ("tokenizer.ggml.bos_token_id".to_owned(), Value::U32(1)),
            ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
        ]);
        (metadata, file)
    }

    #[test]
    fn sentence_piece_ids_are_its_own() {
        let (metadata, file) = sentence_piece_file();
        let (tokenizer, named) = read(&Metadata(&metadata)).unwrap();
        assert_eq!((named.bos, named.eos), (Some(1), Some(2)));
        for case in file["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let wanted: Vec<u32> =
                case["ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
            let got = tokenizer.encode_fast(text, false).unwrap();
            assert_eq!(got.get_ids(), wanted, "{text:?}");
            if !text.contains('▁') {
                assert_eq!(tokenizer.decode(&wanted, true).unwrap(), text);
            }
            let with_bos = tokenizer.encode_fast(text, true).unwrap();
            assert_eq!(with_bos.get_ids()[0], 1, "BOS by default");
            assert_eq!(with_bos.get_ids()[1..], wanted);
        }
    }

    #[test]
    fn eos_is_added_when_the_file_says_so() {
        let (mut metadata, _) = sentence_piece_file();
        metadata.insert("tokenizer.ggml.add_eos_token".to_owned(), Value::Bool(true));
        metadata.insert("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(false));
        let (tokenizer, _) = read(&Metadata(&metadata)).unwrap();
        let ids = tokenizer.encode_fast("a", true).unwrap();
        assert_eq!((ids.get_ids().first() == Some(&1), ids.get_ids().last()), (false, Some(&2)));
    }

    #[test]
    fn every_named_cut_compiles_and_loses_nothing() {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let text = "I'm DON'T x²  1234567 \r\n\n\tGröße 日本語 한국어 😀 a_b/c <|x|>   ";
        let names = pretokenize::KNOWN.split(',').map(str::trim);
        for name in names {
            let cut = pretokenize::cut(name).unwrap_or_else(|| panic!("{name} is not known"));
            let mut cutting = PreTokenizedString::from(text);
            cuts(&cut).unwrap().pre_tokenize(&mut cutting).unwrap();
            let pieces = cutting.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let joined: String = pieces.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
            assert_eq!(joined, text, "{name}");
            assert!(pieces.len() > 10, "{name}");
        }
    }
}
