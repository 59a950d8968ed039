//! Settings as text: reading, writing, overriding and comparing them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::Config;
use crate::error::{Error, Result};

/// Settings that a resumed training may change: where data and given weights lie, and how long ranks wait.
const MAY_CHANGE: [&str; 7] = [
    "data.root",
    "data.pairs",
    "data.real_masks",
    "data.unlabelled",
    "train.teacher",
    "train.start_weights",
    "ranks.timeout_s",
];

/// Settings of which `none` is a value rather than their absence.
const NONE_IS_A_VALUE: [&str; 1] = ["data.labels"];

impl Config {
    /// Reads settings from a TOML file. Ranges are checked by [`Self::validate`].
    ///
    /// # Errors
    /// When the file cannot be read; when a key is unknown or a value has the wrong type, with the line.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(&text).map_err(|what| Error::Config(format!("{}: {what}", path.display())))
    }

    /// Reads the settings that a training wrote: all of them, unlike a file by hand, in which defaults may be left out.
    ///
    /// # Errors
    /// Same as [`Self::read`], and when the file is empty or cut.
    pub fn read_written(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let wrong = |what: String| Error::Config(format!("{}: {what}", path.display()));
        let table: toml::Table = text.parse().map_err(|e| wrong(describe(&e, &text)))?;
        let config = Self::parse(&text).map_err(wrong)?;
        let there = entries_of(&toml::Value::Table(table));
        match config.entries()?.into_keys().find(|key| !there.contains_key(key)) {
            Some(missing) => Err(wrong(format!(
                "expected all settings of a training, found no {missing}: the file was emptied, cut or edited"
            ))),
            None => Ok(config),
        }
    }

    /// Returns each setting by which this is not the training of `before`, such as `optim.lr = 0.5 instead of 0.1`.
    /// Where data and given weights lie is not compared, only whether there are any: what they are is told by their
    /// fingerprints. How long ranks wait is not compared either.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn differences(&self, before: &Self) -> Result<Vec<String>> {
        let (before, now) = (before.entries()?, self.entries()?);
        let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
        let of_key = |key: &String| match (before.get(key), now.get(key)) {
            (before, now) if before == now => None,
            (Some(_), Some(_)) if MAY_CHANGE.contains(&key.as_str()) => None,
            (before, now) => {
                let or_none = |value: Option<&String>| value.map_or("none", String::as_str).to_owned();
                Some(format!("{key} = {} instead of {}", or_none(now), or_none(before)))
            }
        };
        Ok(keys.into_iter().filter_map(of_key).collect())
    }

    /// Parses settings from TOML text.
    ///
    /// # Errors
    /// When a key is unknown or a value has the wrong type, with the line.
    pub(in crate::train) fn parse(text: &str) -> std::result::Result<Self, String> {
        toml::from_str(text).map_err(|e| describe(&e, text))
    }

    /// Sets the value at a dotted path, such as `optim.lr=0.05` or `mask.kinds=["cloth"]`. A bare word is a string, and
    /// `none` restores the default.
    ///
    /// # Errors
    /// When `=` is missing, the setting is unknown, or the value has the wrong type.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let wrong = |what: String| Error::Config(format!("--set {assignment}: {what}"));
        let (path, value) = assignment.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE".into()))?;
        let (path, value) = (path.trim(), value.trim());
        // A seed too large for a settings file, given as a flag of its own.
        self.check_seeds()?;
        let parsed = format!("x = {value}").parse::<toml::Table>().ok().filter(|t| t.len() == 1);
        let parsed = match parsed.and_then(|mut t| t.remove("x")) {
            Some(parsed) => parsed,
            None if value.parse::<f64>().is_ok() => {
                let range = "whole numbers up to 9223372036854775807, or with a digit on each side of the point";
                return Err(wrong(format!("expected a number as TOML writes it, {range}, found {value}")));
            }
            None => toml::Value::String(value.to_owned()),
        };
        let mut all = self.to_value().map_err(|e| wrong(e.to_string()))?;
        let mut place = &mut all;
        let keys: Vec<&str> = path.split('.').collect();
        for key in &keys[..keys.len() - 1] {
            place = place.get_mut(key).ok_or_else(|| wrong(format!("no section {key}")))?;
        }
        let table = place.as_table_mut().ok_or_else(|| wrong("not a section".into()))?;
        match value {
            "none" if !NONE_IS_A_VALUE.contains(&path) => table.remove(keys[keys.len() - 1]),
            _ => table.insert(keys[keys.len() - 1].to_owned(), parsed),
        };
        let all = toml::to_string(&all).map_err(|e| wrong(e.to_string()))?;
        *self = toml::from_str(&all).map_err(|e| wrong(e.message().to_owned()))?;
        Ok(())
    }

    /// Returns the settings as TOML. Optional settings without a value are left out.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        self.to_value().and_then(|all| toml::to_string_pretty(&all)).map_err(|e| Error::Config(e.to_string()))
    }

    /// Returns the settings as a TOML value. All go through it: every further pair of a serde format and a tree of
    /// settings is tens of thousands of instructions to compile.
    fn to_value(&self) -> std::result::Result<toml::Value, toml::ser::Error> {
        toml::Value::try_from(self)
    }

    /// Returns all settings: dotted path to value, in TOML notation.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn entries(&self) -> Result<BTreeMap<String, String>> {
        let all = self.to_value().map_err(|e| Error::Config(e.to_string()))?;
        Ok(entries_of(&all))
    }

    /// Returns the [`Self::entries`] that are missing or different in `other`.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn entries_unlike(&self, other: &Self) -> Result<BTreeMap<String, String>> {
        let others = other.entries()?;
        Ok(self.entries()?.into_iter().filter(|(key, value)| others.get(key) != Some(value)).collect())
    }
}

/// Returns the values in nested tables: dotted path to value, in TOML notation.
fn entries_of(all: &toml::Value) -> BTreeMap<String, String> {
    let (mut entries, mut left) = (BTreeMap::new(), vec![(String::new(), all)]);
    while let Some((path, value)) = left.pop() {
        match value {
            toml::Value::Table(table) => {
                let dot = if path.is_empty() { "" } else { "." };
                left.extend(table.iter().map(|(key, value)| (format!("{path}{dot}{key}"), value)));
            }
            value => {
                entries.insert(path, value.to_string());
            }
        }
    }
    entries
}

/// Returns a TOML error as one line, with its line number.
fn describe(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => format!("line {}: {message}", text[..span.start.min(text.len())].matches('\n').count() + 1),
        None => message,
    }
}
