//! Which bytes is a token, taken alone?
//!
//! Byte-level vocabularies write bytes as printable characters (Radford et al. 2019, GPT-2), sentencepiece ones write a space
//! as `▁` and bytes without a token as `<0x0A>`.

use tokenizers::{AddedToken, DecoderWrapper};

use super::Text;

/// What sentencepiece writes for a space.
const SPACE: char = '▁';

impl Text {
    /// The bytes that a token adds to a text: often whole characters, sometimes a part of one. Those of a special token are its
    /// name. `None`: there is no such token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let name = self.tokenizer.id_to_token(id)?;
        if self.added(id).is_some() {
            return Some(name.into_bytes());
        }
        if self.is_byte_level() {
            let bytes: Option<Vec<u8>> = name.chars().map(byte_of).collect();
            return Some(bytes.unwrap_or_else(|| name.into_bytes()));
        }
        let byte = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            return Some(vec![byte]);
        }
        Some(name.replace(SPACE, " ").into_bytes())
    }

    /// Whether the token is one that the model's files call special: [`Text::decode`] leaves it out.
    pub fn is_special(&self, id: u32) -> bool {
        self.added(id).is_some_and(|token| token.special)
    }

    /// The text of `tokens`, special tokens as they are written.
    pub fn decode_written(&self, tokens: &[u32]) -> Result<String, crate::ModelError> {
        self.tokenizer.decode(tokens, false).map_err(|e| super::tokenizer_error(&e))
    }

    fn added(&self, id: u32) -> Option<&AddedToken> {
        self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id)
    }

    fn is_byte_level(&self) -> bool {
        match self.tokenizer.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => true,
            Some(DecoderWrapper::Sequence(list)) => {
                list.get_decoders().iter().any(|one| matches!(one, DecoderWrapper::ByteLevel(_)))
            }
            _ => false,
        }
    }
}

/// The byte that a byte-level vocabulary writes as `letter`: printable ones as themselves, the 68 others from U+0100 on.
fn byte_of(letter: char) -> Option<u8> {
    let prints = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(letter) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(prints),
        code => (0..=0xFF).filter(|byte| !prints(byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use super::byte_of;

    #[test]
    fn every_byte_has_one_letter() {
        let letters: Vec<char> =
            (0..0x200).filter_map(char::from_u32).filter(|c| byte_of(*c).is_some()).collect();
        let mut bytes: Vec<u8> = letters.iter().filter_map(|letter| byte_of(*letter)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=0xFF).collect::<Vec<u8>>());
        assert_eq!(
            [byte_of('Ġ'), byte_of('Ċ'), byte_of('a'), byte_of('ł')],
            [Some(32), Some(10), Some(97), Some(160)]
        );
        assert_eq!((byte_of(' '), byte_of('\u{144}')), (None, None));
    }
}
