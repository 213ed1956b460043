//! TOML as it is being written: tables in their order, each key with a remark.

use std::fmt::Write;

use toml::Value;

/// A file, or a part of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draft {
    tables: Vec<Table>,
}

#[derive(Clone, Debug, PartialEq)]
struct Table {
    /// Empty for the keys before all tables.
    name: String,
    /// One of several of this name.
    one_of_many: bool,
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq)]
enum Entry {
    Remark(String),
    Key(&'static str, Value),
}

impl Draft {
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    fn table(&mut self, name: &str) -> &mut Table {
        let at = self.tables.iter().position(|table| table.name == name && !table.one_of_many).unwrap_or_else(|| {
            let table = Table { name: name.to_owned(), one_of_many: false, entries: Vec::new() };
            // Keys of no table stand before all of them.
            let at = if name.is_empty() { 0 } else { self.tables.len() };
            self.tables.insert(at, table);
            at
        });
        &mut self.tables[at]
    }

    /// Sets a key of a table, once.
    pub fn set(&mut self, table: &str, key: &'static str, value: impl Into<Value>) {
        let entries = &mut self.table(table).entries;
        debug_assert!(!entries.iter().any(|entry| matches!(entry, Entry::Key(known, _) if *known == key)), "{key}");
        entries.push(Entry::Key(key, value.into()));
    }

    /// A comment line at the end of a table.
    pub fn remark(&mut self, table: &str, text: impl Into<String>) {
        self.table(table).entries.push(Entry::Remark(text.into()));
    }

    /// Appends one of several tables of a name.
    pub fn append(&mut self, table: &str, keys: Vec<(&'static str, Value)>) {
        let entries = keys.into_iter().map(|(key, value)| Entry::Key(key, value)).collect();
        self.tables.push(Table { name: table.to_owned(), one_of_many: true, entries });
    }

    /// The text of the file.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for table in &self.tables {
            if !text.is_empty() {
                text.push('\n');
            }
            // Writing to a String does not fail.
            let _ = match (table.name.as_str(), table.one_of_many) {
                ("", _) => Ok(()),
                (name, false) => writeln!(text, "[{name}]"),
                (name, true) => writeln!(text, "[[{name}]]"),
            };
            for entry in &table.entries {
                let _ = match entry {
                    Entry::Remark(remark) => writeln!(text, "# {remark}"),
                    Entry::Key(key, value) => writeln!(text, "{key} = {value}"),
                };
            }
        }
        text
    }
}
