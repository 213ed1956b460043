//! Protocol buffers as text, read without a schema: fields with their places, in their order.
//!
//! The language is that of <https://protobuf.dev/reference/protobuf/textformat-spec/>: comments, `name: value`, messages in `{}` or
//! `<>`, lists in `[]`, numbers in base 8, 10 and 16, strings with escapes and side by side, `,` and `;` between fields. Names in
//! brackets (extensions, `Any`) are refused: none of the files that are read here has them.
//!
//! Why not a crate: those that read this format (prost-reflect, protobuf) read it for a compiled schema, and refuse what that does
//! not have. Here a field that nobody knows must be reported with its place, and the schemas of two servers would have to be kept.
//!
//! Always true
//! - A text is read whole or not at all; an error says line and column, what was expected and what came.
//! - At most [`BYTES_MAX`] bytes, [`FIELDS_MAX`] fields, messages inside each other [`DEPTH_MAX`] deep.

use std::fmt;

pub const BYTES_MAX: usize = 1 << 20;
pub const FIELDS_MAX: usize = 1 << 16;
pub const DEPTH_MAX: usize = 32;

/// Line and column, both from 1; a column is a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    pub at: Place,
    pub fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    TooLong { bytes: usize },
    TooManyFields,
    TooDeep,
    Expected { what: &'static str, got: String },
    UnendedString,
    BadEscape(String),
    BadNumber(String),
    Extension,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.at)?;
        match &self.fault {
            Fault::TooLong { bytes } => write!(f, "expected at most {BYTES_MAX} bytes, got {bytes}"),
            Fault::TooManyFields => write!(f, "expected at most {FIELDS_MAX} fields, here is one more"),
            Fault::TooDeep => write!(f, "expected messages at most {DEPTH_MAX} deep, here is one deeper"),
            Fault::Expected { what, got } => write!(f, "expected {what}, got {got}"),
            Fault::UnendedString => write!(f, "expected the string to end on its line"),
            Fault::BadEscape(text) => write!(f, "expected an escape such as \\n, \\\" or \\x41, got {text}"),
            Fault::BadNumber(text) => write!(f, "expected a number, got {text}"),
            Fault::Extension => {
                write!(f, "expected a plain field name; names in brackets (extensions, Any) are not read")
            }
        }
    }
}

impl std::error::Error for SyntaxError {}

/// Fields in their order. One of a list is a field like one that is repeated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    pub fields: Vec<Field>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    pub name: String,
    pub at: Place,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Beyond 64 bits is not a number of this language.
    Integer(i128),
    Float(f64),
    Text(Vec<u8>),
    /// An enum's value, `true`, `false`.
    Word(String),
    Message(Message),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Integer(number) => write!(f, "{number}"),
            Value::Float(number) => write!(f, "{number}"),
            Value::Text(bytes) => write!(f, "\"{}\"", bytes.escape_ascii()),
            Value::Word(word) => f.write_str(word),
            Value::Message(message) => {
                f.write_str("{")?;
                for field in &message.fields {
                    match &field.value {
                        Value::Message(_) => write!(f, " {} {}", field.name, field.value)?,
                        _ => write!(f, " {}: {}", field.name, field.value)?,
                    }
                }
                f.write_str(" }")
            }
        }
    }
}

/// Reads a text.
pub fn parse(text: &str) -> Result<Message, SyntaxError> {
    let start = Place { line: 1, column: 1 };
    if text.len() > BYTES_MAX {
        return Err(SyntaxError { at: start, fault: Fault::TooLong { bytes: text.len() } });
    }
    let mut parser = Parser { rest: text, at: start, fields: 0 };
    parser.skip();
    let message = parser.fields_until(None, 0)?;
    debug_assert!(parser.rest.is_empty());
    Ok(message)
}

struct Parser<'a> {
    rest: &'a str,
    at: Place,
    fields: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn bump(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.rest = &self.rest[next.len_utf8()..];
        self.at = match next {
            '\n' => Place { line: self.at.line + 1, column: 1 },
            _ => Place { column: self.at.column + 1, ..self.at },
        };
        Some(next)
    }

    /// Passes blanks and comments.
    fn skip(&mut self) {
        while let Some(next) = self.peek() {
            match next {
                ' ' | '\n' | '\r' | '\t' | '\x0b' | '\x0c' => drop(self.bump()),
                '#' => while self.bump().is_some_and(|passed| passed != '\n') {},
                _ => return,
            }
        }
    }

    /// Takes this character and the blanks behind it, if it is next.
    fn take(&mut self, wanted: char) -> bool {
        let there = self.peek() == Some(wanted);
        if there {
            self.bump();
            self.skip();
        }
        there
    }

    fn fail<T>(&self, fault: Fault) -> Result<T, SyntaxError> {
        Err(SyntaxError { at: self.at, fault })
    }

    fn expected<T>(&self, what: &'static str) -> Result<T, SyntaxError> {
        let got = match self.peek() {
            None => "the end".to_owned(),
            Some(next) => format!("{next:?}"),
        };
        self.fail(Fault::Expected { what, got })
    }

    /// Fields up to the bracket, or to the end of the text.
    fn fields_until(&mut self, end: Option<char>, depth: usize) -> Result<Message, SyntaxError> {
        let mut message = Message::default();
        loop {
            match (self.peek(), end) {
                (None, None) => return Ok(message),
                (Some(next), Some(end)) if next == end => {
                    self.take(end);
                    return Ok(message);
                }
                (Some('['), _) => return self.fail(Fault::Extension),
                (Some(next), _) if is_letter(next) => self.field(&mut message.fields, depth)?,
                (_, None) => return self.expected("a field name"),
                (_, Some('}')) => return self.expected("a field name or '}'"),
                (_, Some(_)) => return self.expected("a field name or '>'"),
            }
        }
    }

    fn field(&mut self, fields: &mut Vec<Field>, depth: usize) -> Result<(), SyntaxError> {
        let at = self.at;
        let name = self.word().to_owned();
        self.skip();
        let colon = self.take(':');
        let mut push = |parser: &mut Self, value| {
            parser.fields += 1;
            if parser.fields > FIELDS_MAX {
                return Err(SyntaxError { at, fault: Fault::TooManyFields });
            }
            fields.push(Field { name: name.clone(), at, value });
            Ok(())
        };
        if self.take('[') {
            if !self.take(']') {
                loop {
                    let value = self.value(colon, depth)?;
                    push(self, value)?;
                    if self.take(']') {
                        break;
                    }
                    if !self.take(',') {
                        return self.expected("',' or ']'");
                    }
                }
            }
        } else {
            let value = self.value(colon, depth)?;
            push(self, value)?;
        }
        if !self.take(',') {
            self.take(';');
        }
        Ok(())
    }

    /// `colon`: a colon stood before it, without which only a message may come.
    fn value(&mut self, colon: bool, depth: usize) -> Result<Value, SyntaxError> {
        match self.peek() {
            Some(open @ ('{' | '<')) => {
                if depth + 1 > DEPTH_MAX {
                    return self.fail(Fault::TooDeep);
                }
                self.take(open);
                let end = if open == '{' { '}' } else { '>' };
                Ok(Value::Message(self.fields_until(Some(end), depth + 1)?))
            }
            _ if !colon => self.expected("':', '{' or '<'"),
            Some('"' | '\'') => self.strings().map(Value::Text),
            Some('-') => {
                self.take('-');
                match self.peek() {
                    Some(next) if is_letter(next) => match self.word().to_ascii_lowercase().as_str() {
                        "inf" | "infinity" => Ok(Value::Float(f64::NEG_INFINITY)),
                        "nan" => Ok(Value::Float(f64::NAN)),
                        other => self.fail(Fault::BadNumber(format!("-{other}"))),
                    },
                    _ => self.number(true),
                }
                .inspect(|_| self.skip())
            }
            Some(next) if next.is_ascii_digit() || next == '.' => self.number(false).inspect(|_| self.skip()),
            Some(next) if is_letter(next) => {
                let word = self.word();
                self.skip();
                Ok(Value::Word(word.to_owned()))
            }
            _ => self.expected("a value"),
        }
    }

    fn word(&mut self) -> &'a str {
        let length = self.rest.find(|next: char| !is_letter(next) && !next.is_ascii_digit()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(length);
        self.rest = rest;
        self.at.column += length;
        word
    }

    fn number(&mut self, negative: bool) -> Result<Value, SyntaxError> {
        let at = self.at;
        let mut length = 0;
        let mut before = ' ';
        for next in self.rest.chars() {
            // A sign belongs to it only as that of an exponent, which hexadecimal numbers have none of.
            let exponent = matches!(before, 'e' | 'E') && !self.rest.starts_with("0x") && !self.rest.starts_with("0X");
            if next.is_ascii_alphanumeric() || next == '.' || next == '_' || (exponent && matches!(next, '+' | '-')) {
                length += next.len_utf8();
                before = next;
            } else {
                break;
            }
        }
        let (text, rest) = self.rest.split_at(length);
        let value = read_number(text, negative);
        let value = value.ok_or_else(|| {
            let got = if text.is_empty() { rest.chars().take(1).collect() } else { text.to_owned() };
            SyntaxError { at, fault: Fault::BadNumber(format!("{got:?}")) }
        })?;
        self.rest = rest;
        self.at.column += length;
        Ok(value)
    }

    /// Strings side by side are one.
    fn strings(&mut self) -> Result<Vec<u8>, SyntaxError> {
        let mut bytes = Vec::new();
        while let Some(quote @ ('"' | '\'')) = self.peek() {
            let opened = self.at;
            self.bump();
            loop {
                match self.bump() {
                    Some(next) if next == quote => break,
                    None | Some('\n') => return Err(SyntaxError { at: opened, fault: Fault::UnendedString }),
                    Some('\\') => self.escape(&mut bytes)?,
                    Some(next) => bytes.extend(next.encode_utf8(&mut [0; 4]).bytes()),
                }
            }
            self.skip();
        }
        Ok(bytes)
    }

    /// What stands behind a backslash.
    fn escape(&mut self, bytes: &mut Vec<u8>) -> Result<(), SyntaxError> {
        let at = self.at;
        let bad = |text: String| Err(SyntaxError { at, fault: Fault::BadEscape(format!("\\{text}")) });
        let Some(kind) = self.bump() else { return bad(String::new()) };
        let byte = match kind {
            'a' => 7,
            'b' => 8,
            'f' => 12,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 11,
            '?' | '\\' | '\'' | '"' => kind as u8,
            '0'..='7' => {
                let mut digits = kind.to_string();
                digits += &self.digits(2, 8);
                match u8::from_str_radix(&digits, 8) {
                    Ok(byte) => byte,
                    Err(_) => return bad(digits),
                }
            }
            'x' | 'X' => match u8::from_str_radix(&self.digits(2, 16), 16) {
                Ok(byte) => byte,
                Err(_) => return bad("x".to_owned()),
            },
            'u' | 'U' => {
                let wanted = if kind == 'u' { 4 } else { 8 };
                let digits = self.digits(wanted, 16);
                let found = (digits.len() == wanted).then(|| u32::from_str_radix(&digits, 16).ok()).flatten();
                match found.and_then(char::from_u32) {
                    Some(found) => bytes.extend(found.encode_utf8(&mut [0; 4]).bytes()),
                    None => return bad(format!("{kind}{digits}")),
                }
                return Ok(());
            }
            other => return bad(other.to_string()),
        };
        bytes.push(byte);
        Ok(())
    }

    /// At most so many digits of a base.
    fn digits(&mut self, most: usize, base: u32) -> String {
        let mut digits = String::new();
        while digits.len() < most
            && let Some(next) = self.peek().filter(|next| next.is_digit(base))
        {
            digits.push(next);
            self.bump();
        }
        digits
    }
}

fn is_letter(next: char) -> bool {
    next.is_ascii_alphabetic() || next == '_'
}

fn read_number(text: &str, negative: bool) -> Option<Value> {
    let sign = if negative { -1 } else { 1 };
    let whole =
        |digits: &str, base| u64::from_str_radix(digits, base).ok().map(|n| Value::Integer(sign * i128::from(n)));
    if text.starts_with(|first: char| first.is_ascii_digit()) && !text.contains(['.', '+']) {
        if let Some(digits) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
            return whole(digits, 16);
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return if text.len() > 1 && text.starts_with('0') { whole(text, 8) } else { whole(text, 10) };
        }
    }
    // What Rust reads besides (inf, nan, 1_0) has letters that no number of this language has.
    let digits = text.strip_suffix(['f', 'F']).unwrap_or(text);
    let plain = |byte: u8| byte.is_ascii_digit() || b".eE+-".contains(&byte);
    let octal = digits.len() > 1 && digits.starts_with('0') && digits.as_bytes()[1].is_ascii_digit();
    let number: f64 = (!octal && digits.bytes().all(plain)).then(|| digits.parse().ok()).flatten()?;
    Some(Value::Float(f64::from(sign as i8) * number))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(text: &str) -> Vec<(String, String)> {
        let message = parse(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        message.fields.into_iter().map(|field| (field.name, field.value.to_string())).collect()
    }

    fn error(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn the_language_is_read_as_its_specification_has_it() {
        let table: &[(&str, &[(&str, &str)])] = &[
            ("", &[]),
            ("# only a comment", &[]),
            ("a: 1 b: 2", &[("a", "1"), ("b", "2")]),
            ("a: 1, b: 2; c: 3", &[("a", "1"), ("b", "2"), ("c", "3")]),
            ("a: [1, 2,3]", &[("a", "1"), ("a", "2"), ("a", "3")]),
            ("a: [] b: -0x1F c: 017 d: 0", &[("b", "-31"), ("c", "15"), ("d", "0")]),
            ("a: - # minus\n 2.5", &[("a", "-2.5")]),
            (
                "a: 1e3 b: 2.5f c: .5 d: 1. e: 10F",
                &[("a", "1000"), ("b", "2.5"), ("c", "0.5"), ("d", "1"), ("e", "10")],
            ),
            ("a: -inf b: TYPE_FP32 c: true", &[("a", "-inf"), ("b", "TYPE_FP32"), ("c", "true")]),
            ("m { x: 1 } m: < y <> >", &[("m", "{ x: 1 }"), ("m", "{ y { } }")]),
            ("m [ { x: 1 }, < > ]", &[("m", "{ x: 1 }"), ("m", "{ }")]),
            ("a: 'it\\'s' \"\\x41\\102\" # one string\n '\\u00e9'", &[("a", "\"it\\'sAB\\xc3\\xa9\"")]),
        ];
        for (text, expected) in table {
            let expected: Vec<(String, String)> =
                expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            assert_eq!(fields(text), expected, "{text}");
        }
    }

    #[test]
    fn an_error_says_where_and_what_was_expected() {
        for (text, expected) in [
            ("a", "1:2: expected ':', '{' or '<', got the end"),
            ("a: 1\n b 2", "2:4: expected ':', '{' or '<', got '2'"),
            ("a: 1 }", "1:6: expected a field name, got '}'"),
            ("m {\n a: 1\n", "3:1: expected a field name or '}', got the end"),
            ("m < a: 1 }", "1:10: expected a field name or '>', got '}'"),
            ("a: [1 2]", "1:7: expected ',' or ']', got '2'"),
            ("a: [1,]", "1:7: expected a value, got ']'"),
            ("a: 'x\n'", "1:4: expected the string to end on its line"),
            ("a: '\\q'", "1:6: expected an escape such as \\n, \\\" or \\x41, got \\q"),
            ("a: 10bar", "1:4: expected a number, got \"10bar\""),
            ("a: 089", "1:4: expected a number, got \"089\""),
            ("a: 99999999999999999999", "1:4: expected a number, got \"99999999999999999999\""),
            ("[a.b]: 1", "1:1: expected a plain field name; names in brackets (extensions, Any) are not read"),
            ("é: 1", "1:1: expected a field name, got 'é'"),
        ] {
            assert_eq!(error(text), expected);
        }
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_kept() {
        let deep = |depth: usize| format!("{}{}", "m {".repeat(depth), "}".repeat(depth));
        assert!(parse(&deep(DEPTH_MAX)).is_ok());
        assert!(error(&deep(DEPTH_MAX + 1)).contains("at most 32 deep"));
        assert!(error(&"m {".repeat(100_000)).contains("at most 32 deep"));
        let many = |fields: usize| format!("a: [{}0]", "0,".repeat(fields - 1));
        assert!(parse(&many(FIELDS_MAX)).is_ok());
        assert!(error(&many(FIELDS_MAX + 1)).contains("at most 65536 fields"));
        assert!(error(&" ".repeat(BYTES_MAX + 1)).contains("at most 1048576 bytes"));
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<u64>().prop_map(|n| Value::Integer(n.into())),
            any::<i64>().prop_map(|n| Value::Integer(n.into())),
            prop::collection::vec(any::<u8>(), 0..12).prop_map(Value::Text),
            "[a-zA-Z_][a-zA-Z0-9_]{0,8}".prop_map(Value::Word),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop::collection::vec(("[a-z_][a-z0-9_]{0,6}", inner), 0..6).prop_map(|fields| {
                let at = Place { line: 1, column: 1 };
                let fields = fields.into_iter().map(|(name, value)| Field { name, at, value }).collect();
                Value::Message(Message { fields })
            })
        })
    }

    /// Without places, which a text of other blanks has elsewhere.
    fn bare(message: &Message) -> Vec<(String, Value)> {
        let value = |value: &Value| match value {
            Value::Message(inner) => Value::Message(Message {
                fields: bare(inner)
                    .into_iter()
                    .map(|(name, value)| Field { name, at: Place { line: 0, column: 0 }, value })
                    .collect(),
            }),
            other => other.clone(),
        };
        message.fields.iter().map(|field| (field.name.clone(), value(&field.value))).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(fields in prop::collection::vec(("[a-z]{1,6}", values()), 0..6)) {
            let at = Place { line: 1, column: 1 };
            let fields = fields.into_iter().map(|(name, value)| Field { name, at, value }).collect();
            let message = Message { fields };
            let text = Value::Message(message.clone()).to_string();
            let text = &text[1..text.len() - 1];
            let read = parse(text).map_err(|error| TestCaseError::fail(format!("{error}: {text}")))?;
            prop_assert_eq!(bare(&read), bare(&message), "{}", text);
        }

        #[test]
        fn any_text_is_read_or_refused_at_a_place_inside_it(text in "[a-z0-9_:{}<>\\[\\],;#\"'\\\\ \n.+-]{0,80}") {
            if let Err(error) = parse(&text) {
                let line = text.split('\n').nth(error.at.line - 1).expect("a line of the text");
                prop_assert!(error.at.column <= line.chars().count() + 1, "{}", error);
            }
        }
    }
}
