//! Text to token ids, with the model's own tokenizer and nothing of its own opinion about length.
//!
//! Published tokenizer.json files ask for padding and truncation (all-MiniLM-L6-v2's: both, to 128). Here both are off:
//! padding belongs to the batch, and a text is never shortened in silence.
//!
//! Always true
//! - The bytes of a text are bounded before the tokenizer sees it, so its cost is bounded too.
//! - What comes out has between `len_min` and `len_max` ids, or it is an error that says how many there were.
//! - A text that was shortened says so, and still ends with its final special tokens (`[SEP]`).
//!
//! Elsewhere: that the bytes are UTF-8 (contract.rs), on which threads this runs (server).

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use crate::vocab::Refusal;

/// How much text and how many ids are allowed, and what happens to more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextLimits {
    /// Longest text in bytes.
    pub bytes_max: u32,
    pub len_min: u32,
    /// Most ids, special tokens included.
    pub len_max: u32,
    /// Cut what is over `len_max` instead of refusing it. Whether this caller wants that is for the one who calls `encode`
    /// to know, who sees `truncated_from`.
    pub truncate: bool,
}

/// A tokenizer file that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerError {
    pub file: PathBuf,
    pub message: String,
}

impl fmt::Display for TokenizerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.message)
    }
}

impl std::error::Error for TokenizerError {}

/// Why a text did not become ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextError {
    TooManyBytes { expected: u32, received: usize },
    TooManyIds { expected: u32, received: usize },
    TooFewIds { expected: u32, received: usize },
    Tokenizer(String),
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyBytes { expected, received } => {
                write!(f, "expected at most {expected} bytes of text, got {received}")
            }
            Self::TooManyIds { expected, received } => {
                write!(f, "expected a text of at most {expected} tokens, got {received}")
            }
            Self::TooFewIds { expected, received } => {
                write!(f, "expected a text of at least {expected} tokens, got {received}")
            }
            Self::Tokenizer(message) => write!(f, "the text could not be tokenized: {message}"),
        }
    }
}

impl std::error::Error for TextError {}

impl From<TextError> for Refusal {
    fn from(error: TextError) -> Refusal {
        let message = error.to_string();
        match error {
            TextError::TooManyBytes { .. } | TextError::TooManyIds { .. } => Refusal::too_large(message),
            TextError::TooFewIds { .. } | TextError::Tokenizer(_) => Refusal::invalid(message),
        }
    }
}

/// The ids of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    pub ids: Vec<u32>,
    /// How many ids the whole text has, when only a part of it is in `ids`.
    pub truncated_from: Option<u32>,
}

/// A model's tokenizer and its limits. Shared by all threads that tokenize.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    limits: TextLimits,
    /// The largest id that the model knows.
    id_last: u32,
}

/// Larger than any vocabulary in use (multilingual ones are near 20 MB), small enough to hold.
const FILE_BYTES_MAX: u64 = 256 << 20;

impl TextTokenizer {
    /// Loads a tokenizer.json, checked against its SHA-256 where there is one. `id_last` is the largest id that the model
    /// knows: a tokenizer that can make a larger one is refused now, not at the first unlucky word.
    pub fn load(
        file: &Path,
        sha256: Option<&str>,
        limits: TextLimits,
        id_last: u32,
    ) -> Result<TextTokenizer, TokenizerError> {
        let failed = |message: String| TokenizerError { file: file.to_path_buf(), message };
        let size = std::fs::metadata(file).map_err(|error| failed(format!("cannot be read: {error}")))?.len();
        if size > FILE_BYTES_MAX {
            return Err(failed(format!("expected at most {FILE_BYTES_MAX} bytes, it has {size}")));
        }
        let bytes = std::fs::read(file).map_err(|error| failed(format!("cannot be read: {error}")))?;
        if let Some(expected) = sha256 {
            let received = crate::models::weights::sha256_hex(&bytes);
            if !received.eq_ignore_ascii_case(expected) {
                return Err(failed(format!("the manifest expects SHA-256 {expected}, the file has {received}")));
            }
        }
        TextTokenizer::from_bytes(&bytes, limits, id_last).map_err(failed)
    }

    /// As [`TextTokenizer::load`], from the bytes of the file.
    pub fn from_bytes(bytes: &[u8], limits: TextLimits, id_last: u32) -> Result<TextTokenizer, String> {
        // The parser of a hostile file has been seen to panic where it should err; that is a load error too.
        let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes))
            .map_err(|_| "is not a tokenizer.json: its parser panicked".to_owned())?
            .map_err(|error| format!("is not a tokenizer.json: {error}"))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        if let Some((word, id)) = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id)
            && id > id_last
        {
            return Err(format!("the model knows ids up to {id_last}, the tokenizer has {word:?} as {id}"));
        }
        Ok(TextTokenizer { tokenizer, limits, id_last })
    }

    pub fn limits(&self) -> TextLimits {
        self.limits
    }

    /// The ids of `text`, special tokens included.
    pub fn encode(&self, text: &str) -> Result<Tokens, TextError> {
        let TextLimits { bytes_max, len_min, len_max, truncate } = self.limits;
        if text.len() > bytes_max as usize {
            return Err(TextError::TooManyBytes { expected: bytes_max, received: text.len() });
        }
        // `fast`: without the offsets into the text, which nobody asks for. Files that load have been seen to panic at a text
        // (tokenizers issue 1452); that ends this text, not the thread, whose end drains the server.
        let encoded = std::panic::catch_unwind(AssertUnwindSafe(|| self.tokenizer.encode_fast(text, true)))
            .map_err(|_| TextError::Tokenizer("the tokenizer panicked".into()))?;
        let encoding = encoded.map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let ids = encoding.get_ids();
        // What a template puts around a text need not be in the vocabulary.
        if let Some(id) = ids.iter().find(|id| **id > self.id_last) {
            let id_last = self.id_last;
            return Err(TextError::Tokenizer(format!("the model knows ids up to {id_last}, the tokenizer made {id}")));
        }
        if ids.len() < len_min as usize {
            return Err(TextError::TooFewIds { expected: len_min, received: ids.len() });
        }
        if ids.len() <= len_max as usize {
            return Ok(Tokens { ids: ids.to_vec(), truncated_from: None });
        }
        let tail = encoding.get_special_tokens_mask().iter().rev().take_while(|special| **special == 1).count();
        // With room for nothing but special tokens there is no text left to answer for.
        if !truncate || tail >= len_max as usize {
            return Err(TextError::TooManyIds { expected: len_max, received: ids.len() });
        }
        let mut kept = ids[..len_max as usize - tail].to_vec();
        kept.extend_from_slice(&ids[ids.len() - tail..]);
        Ok(Tokens { ids: kept, truncated_from: Some(u32::try_from(ids.len()).unwrap_or(u32::MAX)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of one letter, `[CLS]` before and `[SEP]` behind, and the padding and truncation that published files ask for.
    const TINY: &str = r#"{"version":"1.0",
        "truncation":{"max_length":4,"strategy":"LongestFirst","stride":0,"direction":"Right"},
        "padding":{"strategy":{"Fixed":4},"direction":"Right","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"[PAD]"},
        "added_tokens":[
            {"id":0,"special":true,"content":"[PAD]","single_word":false,"lstrip":false,"rstrip":false,"normalized":false},
            {"id":1,"special":true,"content":"[UNK]","single_word":false,"lstrip":false,"rstrip":false,"normalized":false},
            {"id":2,"special":true,"content":"[CLS]","single_word":false,"lstrip":false,"rstrip":false,"normalized":false},
            {"id":3,"special":true,"content":"[SEP]","single_word":false,"lstrip":false,"rstrip":false,"normalized":false}],
        "normalizer":null,
        "pre_tokenizer":{"type":"BertPreTokenizer"},
        "post_processor":{"type":"TemplateProcessing",
            "single":[{"SpecialToken":{"id":"[CLS]","type_id":0}},{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"[SEP]","type_id":0}}],
            "pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
            "special_tokens":{"[CLS]":{"id":"[CLS]","ids":[2],"tokens":["[CLS]"]},"[SEP]":{"id":"[SEP]","ids":[3],"tokens":["[SEP]"]}}},
        "decoder":null,
        "model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"\u0023\u0023","max_input_chars_per_word":100,
            "vocab":{"[PAD]":0,"[UNK]":1,"[CLS]":2,"[SEP]":3,"a":4,"b":5,"c":6}}}"#;

    fn tokenizer(truncate: bool) -> TextTokenizer {
        let limits = TextLimits { bytes_max: 40, len_min: 1, len_max: 6, truncate };
        TextTokenizer::from_bytes(TINY.as_bytes(), limits, 6).expect("is a tokenizer")
    }

    #[test]
    fn what_the_file_says_of_padding_and_truncation_is_switched_off() {
        let tokens = |text| tokenizer(false).encode(text).expect("fits");
        assert_eq!(tokens("a"), Tokens { ids: vec![2, 4, 3], truncated_from: None });
        assert_eq!(tokens("a b c a"), Tokens { ids: vec![2, 4, 5, 6, 4, 3], truncated_from: None });
        assert_eq!(tokens(""), Tokens { ids: vec![2, 3], truncated_from: None });
    }

    #[test]
    fn a_text_of_too_many_tokens_is_refused_with_both_numbers() {
        let error = tokenizer(false).encode("a b c a b").expect_err("has seven");
        assert_eq!(error, TextError::TooManyIds { expected: 6, received: 7 });
        assert_eq!(error.to_string(), "expected a text of at most 6 tokens, got 7");
        assert_eq!(Refusal::from(error).code, crate::vocab::Code::TooLarge);
    }

    #[test]
    fn a_text_is_cut_only_when_asked_keeps_its_last_special_token_and_says_so() {
        let tokens = tokenizer(true).encode("a b c a b c a").expect("is cut");
        assert_eq!(tokens, Tokens { ids: vec![2, 4, 5, 6, 4, 3], truncated_from: Some(9) });
        assert_eq!(tokenizer(true).encode("a").expect("fits").truncated_from, None);
    }

    #[test]
    fn bytes_are_counted_before_anything_is_tokenized() {
        let error = tokenizer(true).encode(&"a ".repeat(21)).expect_err("has 42 bytes");
        assert_eq!(error, TextError::TooManyBytes { expected: 40, received: 42 });
    }

    #[test]
    fn too_few_tokens_are_refused() {
        let limits = TextLimits { bytes_max: 40, len_min: 3, len_max: 6, truncate: false };
        let tokenizer = TextTokenizer::from_bytes(TINY.as_bytes(), limits, 6).expect("is a tokenizer");
        assert_eq!(tokenizer.encode(""), Err(TextError::TooFewIds { expected: 3, received: 2 }));
    }

    #[test]
    fn a_tokenizer_that_can_make_ids_the_model_does_not_know_is_refused() {
        let limits = tokenizer(false).limits();
        let error = TextTokenizer::from_bytes(TINY.as_bytes(), limits, 5).expect_err("c is 6");
        assert_eq!(error, "the model knows ids up to 5, the tokenizer has \"c\" as 6");
        for hostile in ["", "{}", "[", "{\"version\":\"1.0\"}", "null"] {
            let error = TextTokenizer::from_bytes(hostile.as_bytes(), limits, 5).expect_err("is none");
            assert!(error.starts_with("is not a tokenizer.json"), "{error}");
        }
    }

    /// Goal: F64. Method: the file above with one part of it made hostile. It is refused when it is loaded, or it serves, or
    /// each text is refused; nothing panics.
    #[test]
    fn f64_hostile_files_are_refused_or_refuse_and_end_nothing() {
        let deep = format!("{}0{}", "[".repeat(100_000), "]".repeat(100_000));
        let normalizer = |with: &str| TINY.replace(r#""normalizer":null"#, &format!(r#""normalizer":{with}"#));
        let splits = |regex: &str| {
            let split =
                format!(r#"{{"type":"Split","pattern":{{"Regex":"{regex}"}},"behavior":"Isolated","invert":false}}"#);
            TINY.replace(r#"{"type":"BertPreTokenizer"}"#, &split)
        };
        let model = |with: &str| format!("{}{with}}}", &TINY[..TINY.find(r#""model""#).expect("it has one")]);
        let files = [
            ("a deep document", deep),
            ("no charsmap", normalizer(r#"{"type":"Precompiled","precompiled_charsmap":null}"#)),
            ("a cut charsmap", normalizer(r#"{"type":"Precompiled","precompiled_charsmap":"////fwAA"}"#)),
            ("an empty pattern", normalizer(r#"{"type":"Replace","pattern":{"String":""},"content":"b"}"#)),
            ("a regex that is none", splits("(")),
            ("a regex that backtracks", splits("(a|a)*c")),
            ("a regex that looks behind", splits("(?<=a)(?!b)")),
            ("an id beyond the model's", TINY.replace(r#""ids":[2]"#, r#""ids":[4294967295]"#)),
            ("more ids than names", TINY.replace(r#""ids":[2]"#, r#""ids":[2,2,2]"#)),
            (
                "a special token that is missing",
                TINY.replace(r#""special_tokens":{"[CLS]""#, r#""special_tokens":{"[OTHER]""#),
            ),
            ("an unknown word without an id", TINY.replace(r#""unk_token":"[UNK]""#, r#""unk_token":"[none]""#)),
            (
                "an endless prefix",
                TINY.replace(r#""max_input_chars_per_word":100"#, r#""max_input_chars_per_word":18446744073709551615"#),
            ),
            ("an id that is no number", TINY.replace(r#""a":4"#, r#""a":-4"#)),
            ("a merge of nothing", model(r#""model":{"type":"BPE","vocab":{"a":4},"merges":["a b"]}"#)),
            (
                "no unknown word",
                model(r#""model":{"type":"Unigram","unk_id":7,"vocab":[["a",-1.0]],"byte_fallback":false}"#),
            ),
            (
                "a probability that is none",
                model(r#""model":{"type":"Unigram","unk_id":null,"vocab":[["a",1e999]],"byte_fallback":true}"#),
            ),
            ("a model without words", model(r#""model":{"type":"WordLevel","vocab":{},"unk_token":"x"}"#)),
        ];
        let limits = TextLimits { bytes_max: 40, len_min: 1, len_max: 6, truncate: true };
        let texts = [
            "",
            "a",
            "a b c",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab",
            "\u{e000}\u{301}\u{1f469}\u{200d}",
            "[CLS] a",
            "\0",
        ];
        let (mut refused, mut panicked) = (Vec::new(), 0);
        for (what, file) in &files {
            assert_ne!(file, TINY, "{what}");
            match TextTokenizer::from_bytes(file.as_bytes(), limits, 6) {
                Err(message) => refused.push((*what, message)),
                Ok(tokenizer) => {
                    for text in texts {
                        let encoded = tokenizer.encode(text);
                        panicked += u32::from(encoded == Err(TextError::Tokenizer("the tokenizer panicked".into())));
                        let ids = encoded.map(|tokens| tokens.ids).unwrap_or_default();
                        assert!(ids.iter().all(|id| *id <= 6), "{what}: {text:?} became {ids:?}");
                    }
                }
            }
        }
        assert!(refused.len() >= 5, "the parser refuses what it can see: {refused:#?}");
        assert!(panicked > 0, "one of them is known to load and to panic");
        let beyond = TextTokenizer::from_bytes(files[7].1.as_bytes(), limits, 6).expect("its vocabulary is small");
        let error = beyond.encode("a").expect_err("the template has a large id");
        assert_eq!(
            error.to_string(),
            "the text could not be tokenized: the model knows ids up to 6, the tokenizer made 4294967295"
        );
    }
}
