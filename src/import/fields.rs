//! Typed reading of text-format messages, field by field, with what is left over at the end.

use super::textproto::{Message, Place, Value};
use super::{Fault, ImportError};

/// A value and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At<T> {
    pub value: T,
    pub at: Place,
}

/// The fields of one message, each of which is asked for once.
pub struct Fields<'a> {
    path: String,
    message: &'a Message,
    asked: Vec<bool>,
}

impl<'a> Fields<'a> {
    /// `path` is how the message is called in notes and errors; empty for the file itself.
    pub fn new(path: &str, message: &'a Message) -> Fields<'a> {
        Fields { path: path.to_owned(), message, asked: vec![false; message.fields.len()] }
    }

    /// The path of a field of this message.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn all(&mut self, name: &str) -> Vec<At<&'a Value>> {
        let mut found = Vec::new();
        for (field, asked) in self.message.fields.iter().zip(&mut self.asked) {
            if field.name == name {
                *asked = true;
                found.push(At { value: &field.value, at: field.at });
            }
        }
        found
    }

    fn one(&mut self, name: &str) -> Result<Option<At<&'a Value>>, ImportError> {
        let found = self.all(name);
        match found.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(*one)),
            [first, again, ..] => {
                Err(ImportError { at: Some(again.at), fault: Fault::Twice { field: self.path(name), first: first.at } })
            }
        }
    }

    fn wrong<T>(&self, name: &str, found: &At<&Value>, what: &str) -> Result<T, ImportError> {
        let expected = what.to_owned();
        Err(ImportError {
            at: Some(found.at),
            fault: Fault::Value { field: self.path(name), expected, got: found.value.to_string() },
        })
    }

    fn integer_of(&self, name: &str, found: &At<&Value>, least: i64, most: i64) -> Result<At<i64>, ImportError> {
        match found.value {
            Value::Integer(number) if (i128::from(least)..=i128::from(most)).contains(number) => {
                Ok(At { value: *number as i64, at: found.at })
            }
            _ => self.wrong(name, found, &format!("a whole number from {least} to {most}")),
        }
    }

    pub fn integer(&mut self, name: &str, least: i64, most: i64) -> Result<Option<At<i64>>, ImportError> {
        let found = self.one(name)?;
        found.map(|found| self.integer_of(name, &found, least, most)).transpose()
    }

    pub fn integers(&mut self, name: &str, least: i64, most: i64) -> Result<Vec<At<i64>>, ImportError> {
        self.all(name).iter().map(|found| self.integer_of(name, found, least, most)).collect()
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<At<bool>>, ImportError> {
        let Some(found) = self.one(name)? else { return Ok(None) };
        let value = match found.value {
            Value::Word(word) if matches!(word.as_str(), "true" | "True" | "t") => true,
            Value::Word(word) if matches!(word.as_str(), "false" | "False" | "f") => false,
            Value::Integer(number @ (0 | 1)) => *number == 1,
            _ => return self.wrong(name, &found, "true or false"),
        };
        Ok(Some(At { value, at: found.at }))
    }

    pub fn word(&mut self, name: &str) -> Result<Option<At<&'a str>>, ImportError> {
        let Some(found) = self.one(name)? else { return Ok(None) };
        match found.value {
            Value::Word(word) => Ok(Some(At { value: word.as_str(), at: found.at })),
            _ => self.wrong(name, &found, "a name without quotes"),
        }
    }

    pub fn text(&mut self, name: &str) -> Result<Option<At<&'a str>>, ImportError> {
        let Some(found) = self.one(name)? else { return Ok(None) };
        match found.value {
            Value::Text(bytes) => match std::str::from_utf8(bytes) {
                Ok(value) => Ok(Some(At { value, at: found.at })),
                Err(_) => self.wrong(name, &found, "UTF-8"),
            },
            _ => self.wrong(name, &found, "a string in quotes"),
        }
    }

    pub fn messages(&mut self, name: &str) -> Result<Vec<At<&'a Message>>, ImportError> {
        let found = self.all(name);
        let message = |found: &At<&'a Value>| match found.value {
            Value::Message(message) => Ok(At { value: message, at: found.at }),
            _ => self.wrong(name, found, "a message in braces"),
        };
        found.iter().map(message).collect()
    }

    pub fn message(&mut self, name: &str) -> Result<Option<At<&'a Message>>, ImportError> {
        let Some(found) = self.one(name)? else { return Ok(None) };
        match found.value {
            Value::Message(value) => Ok(Some(At { value, at: found.at })),
            _ => self.wrong(name, &found, "a message in braces"),
        }
    }

    /// What nobody asked for: name, place and value, one for each name.
    pub fn rest(&self) -> Vec<(String, At<&'a Value>)> {
        let mut rest: Vec<(String, At<&'a Value>)> = Vec::new();
        for (field, asked) in self.message.fields.iter().zip(&self.asked) {
            if !asked && rest.iter().all(|(name, _)| *name != field.name) {
                rest.push((field.name.clone(), At { value: &field.value, at: field.at }));
            }
        }
        rest
    }
}
