//! MosaicKV
mod fetch;

fn main() {
    let model = std::env::args().nth(1).unwrap_or_else(|| fetch::ALIAS.into());
    match fetch::resolve(&model) {
        Ok(path) => println!("{}", path.display()),
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
    fetch::release_signals();
}
