//! The configuration as written: keys, values and the places they stand in. Judges nothing but its grammar.
//!
//! Always true
//! - Every key is optional. A table is only a prefix: `[frontend]` with `spin_us = 5` and `frontend.spin_us = 5`
//!   give the same item.
//! - Each item knows where it was written, so that a mistake found later can still be shown there.
//!
//! Elsewhere: which keys exist and what values they take (limits.rs).

use std::fmt;

use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// Where a key was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Line 0 stands for the whole file.
    File { path: String, line: usize },
    /// A `--set` of the command line, as it was given.
    Set(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line: 0 } => f.write_str(path),
            Origin::File { path, line } => write!(f, "{path}:{line}"),
            Origin::Set(text) => write!(f, "--set {text}"),
        }
    }
}

/// A scalar as written.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Integer(i128),
    Real(f64),
    Text(String),
    /// Something no key takes (a date, an array), by the name of its type.
    Other(&'static str),
}

impl Value {
    /// Type and value, as they stand in an error.
    pub fn got(&self) -> String {
        match self {
            Value::Bool(value) => format!("{value}"),
            Value::Integer(value) => format!("{value}"),
            Value::Real(value) => format!("{value}"),
            Value::Text(value) => format!("{value:?}"),
            Value::Other(type_name) => format!("a value of type {type_name}"),
        }
    }
}

/// One key with its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Dotted path from the root of the file.
    pub key: String,
    pub value: Value,
    pub origin: Origin,
}

/// Reads a file's text. Syntax errors are added to `errors`; what could be read is returned all the same, so that
/// one missing quote does not hide the other mistakes.
pub fn read(path: &str, text: &str, errors: &mut Vec<ConfigError>) -> Vec<Item> {
    let (table, syntax) = DeTable::parse_recoverable(text);
    let origin = |at: usize| Origin::File { path: path.into(), line: line_of(text, at) };
    for error in &syntax {
        let at = error.span().map_or(0, |span| span.start);
        errors.push(ConfigError::new(origin(at), format!("not TOML: {}", error.message())));
    }
    let mut items = Vec::new();
    flatten("", table.get_ref(), &origin, &mut items);
    // The parser sorts keys; a reader of errors wants the order of the file.
    items.sort_by_key(|item| match item.origin {
        Origin::File { line, .. } => line,
        Origin::Set(_) => 0,
    });
    items
}

/// Reads one `key=value`. A value that is not TOML on its own (`models=dir`) is taken as text.
pub fn read_set(set: &str, errors: &mut Vec<ConfigError>) -> Vec<Item> {
    let origin = Origin::Set(set.into());
    let Some((key, value)) = set.split_once('=') else {
        errors.push(ConfigError::new(origin, "expected key=value, such as frontend.credit_requests=512"));
        return Vec::new();
    };
    let (key, value) = (key.trim().to_owned(), value.trim());
    let value = DeValue::parse(value).map_or_else(|_| Value::Text(value.to_owned()), |parsed| scalar(parsed.get_ref()));
    vec![Item { key, value, origin }]
}

fn flatten(prefix: &str, table: &DeTable<'_>, origin: &dyn Fn(usize) -> Origin, items: &mut Vec<Item>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        match value.get_ref() {
            DeValue::Table(inner) if !inner.is_empty() || super::limits::is_table(&path) => {
                flatten(&path, inner, origin, items);
            }
            value => items.push(Item { key: path, value: scalar(value), origin: origin(key.span().start) }),
        }
    }
}

fn scalar(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::String(value) => Value::Text(value.to_string()),
        DeValue::Integer(value) => match i128::from_str_radix(value.as_str(), value.radix()) {
            Ok(value) => Value::Integer(value),
            Err(_) => Value::Other("integer beyond 128 bits"),
        },
        DeValue::Float(value) => match value.as_str().replace('_', "").parse() {
            Ok(value) => Value::Real(value),
            Err(_) => Value::Other("float"),
        },
        other => Value::Other(other.type_str()),
    }
}

/// Line of a byte in a text, from 1.
fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}
