//! MosaicKV
fn main() {}
