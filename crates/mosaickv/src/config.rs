//! `--config FILE.toml`: flags of `mosaickv serve` that need not be typed.
//!
//! What the file says takes the place of a flag's default, so that a flag, and a variable of the environment, go before it.

use anyhow::{Context, Result, bail, ensure};
use clap::builder::OsStr;
use clap::{ArgAction, Command};
use std::ffi::OsString;
use std::path::Path;
use toml::{Table, Value};

/// The flag.
const FLAG: &str = "--config";

/// What a file is read up to.
const MOST_BYTES: u64 = 1 << 20;

/// `command` with the defaults of the file that `--config` names among the arguments after `serve`, if it does.
pub fn with_defaults(command: Command, arguments: &[OsString]) -> Result<Command> {
    let is_serve = arguments.get(1).is_some_and(|word| word == "serve");
    let Some(path) = named(arguments).filter(|_| is_serve) else { return Ok(command) };
    let path = Path::new(&path);
    let what = || format!("the configuration {}", path.display());
    let length = std::fs::metadata(path).with_context(what)?.len();
    ensure!(length <= MOST_BYTES, "{} has {length} bytes; wanted at most {MOST_BYTES}", what());
    let text = std::fs::read_to_string(path).with_context(what)?;
    let table: Table = text.parse().with_context(what)?;
    let mut serve = command.find_subcommand("serve").cloned().context("there is no serve")?;
    for (key, value) in table {
        serve = with_default(serve, &key, &value).with_context(what)?;
    }
    Ok(command.mut_subcommand("serve", |_| serve))
}

/// The file that the arguments name, or the environment.
fn named(arguments: &[OsString]) -> Option<OsString> {
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        if text == FLAG {
            return words.next().cloned();
        }
        if let Some(path) = text.strip_prefix(FLAG).and_then(|rest| rest.strip_prefix('=')) {
            return Some(path.into());
        }
    }
    std::env::var_os("MOSAICKV_CONFIG")
}

fn with_default(serve: Command, key: &str, value: &Value) -> Result<Command> {
    let id = key.replace('-', "_");
    let Some(known) = serve.get_arguments().find(|arg| arg.get_id() == id.as_str() && id != "config") else {
        let names = serve.get_arguments().map(|arg| arg.get_id().as_str());
        let names: Vec<&str> = names.filter(|name| !["config", "help", "version"].contains(name)).collect();
        bail!("there is no {key}; it may have {}", names.join(", "));
    };
    let takes_many = matches!(known.get_action(), ArgAction::Append) || known.get_value_delimiter().is_some();
    let is_switch = matches!(known.get_action(), ArgAction::SetTrue);
    let values = match value {
        Value::Array(list) if takes_many => {
            list.iter().map(|item| written(key, item)).collect::<Result<Vec<_>>>()?
        }
        Value::Boolean(on) if is_switch => vec![on.to_string()],
        _ if is_switch => bail!("{key} is of the type {}; wanted true or false", value.type_str()),
        other => vec![written(key, other)?],
    };
    let values: Vec<OsStr> = values.into_iter().map(OsStr::from).collect();
    Ok(serve.mut_arg(id, |arg| arg.required(false).default_values(values)))
}

/// A value as it is typed after a flag.
fn written(key: &str, value: &Value) -> Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        other => bail!("{key} is of the type {}; wanted a string or a number", other.type_str()),
    })
}
