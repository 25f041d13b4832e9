//! Any bytes as a GGUF file: an error, or a model whose text can be encoded and decoded. Never a panic, never memory
//! out of proportion to the file.
//!
//! `cargo fuzz run gguf fuzz/corpus/gguf crates/model/tests/data -- -malloc_limit_mb=256 -rss_limit_mb=1024`
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use mosaickv_model::{Message, Model, Specials};

fuzz_target!(|bytes: &[u8]| {
    let Ok((model, text)) = Model::read_gguf(Cursor::new(bytes), &mut |_, _| ()) else { return };
    assert_eq!(model.layers.len(), model.config.layers);
    for specials in [Specials::Written, Specials::Added, Specials::Literal] {
        if let Ok(ids) = text.encode("Ab 12,\n<|im_end|> \u{e9}", specials) {
            assert!(ids.iter().all(|&id| (id as usize) < model.config.vocab));
            let _ = text.decode(&ids);
        }
    }
    let _ = text.chat(&[Message { role: "user".into(), content: "Hi".into() }]);
});
