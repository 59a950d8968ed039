//! Reader of Python pickles (protocols 0 to 5) as data: nothing named in a pickle is looked up, imported or called.
//!
//! [`Pickle::read`] returns the values in one flat list, each with an [`Id`]. Lists and dicts hold ids, so a value that
//! the pickle uses twice is stored once, a value may contain itself, and neither nesting nor sharing can exhaust the
//! stack or memory: one opcode makes at most three values. Callers that walk the values must bound the walk themselves.
//!
//! Opcodes are as documented in Python's `pickletools`; strings of Python 2 are [`Value::Bytes`].

mod interpreter;
mod text;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::Path;

use crate::error::Error;

/// The values of one pickle.
#[derive(Debug)]
pub struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
    num_bytes: usize,
}

/// Index of a value in a [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(u32);

/// A value; it refers to the values it contains by [`Id`].
#[derive(Debug)]
pub enum Value<'a> {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer, as little-endian two's complement.
    Long(&'a [u8]),
    /// A float.
    Float(f64),
    /// Bytes, a bytearray, or a string of Python 2.
    Bytes(Cow<'a, [u8]>),
    /// A string.
    Str(Cow<'a, str>),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list.
    List(Vec<Id>),
    /// A set or frozen set, in the order of the pickle.
    Set(Vec<Id>),
    /// Keys and values in the order of the pickle; a key may occur twice.
    Dict(Vec<(Id, Id)>),
    /// A class or function, by name only.
    Global(Box<Global<'a>>),
    /// The result of a call that was not made.
    Object(Box<Object>),
    /// A reference to something outside the pickle.
    PersistentId(Id),
}

/// The name of a class or function.
#[derive(Debug)]
pub struct Global<'a> {
    /// The module, such as `collections`.
    pub module: Cow<'a, str>,
    /// The name in it, such as `OrderedDict`.
    pub name: Cow<'a, str>,
}

/// A call that was not made, and the operations on its result.
#[derive(Debug)]
pub struct Object {
    /// The callable, a [`Value::Global`] in ordinary pickles.
    pub callable: Id,
    /// The arguments, a [`Value::Tuple`]. Keyword arguments (`NEWOBJ_EX`) are not kept.
    pub args: Id,
    /// The argument of `__setstate__`, or the attributes.
    pub state: Option<Id>,
    /// Elements to append or add to the result.
    pub elements: Vec<Id>,
    /// Items to set in the result, in the order of the pickle.
    pub items: Vec<(Id, Id)>,
}

/// A violation of the pickle format.
#[derive(Debug)]
pub struct PickleError {
    /// Byte offset from the start of the pickle.
    pub offset: usize,
    /// The opcode, and the expected and the actual content.
    pub what: String,
}

impl PickleError {
    /// Converts to the error of a file at `path` in which the pickle starts at byte `start`.
    pub fn in_file(self, path: &Path, start: usize) -> Error {
        let offset = start as u64 + self.offset as u64;
        Error::Format { path: path.to_owned(), offset, what: format!("pickle: {}", self.what) }
    }
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the start of `bytes`; anything after it is ignored.
    ///
    /// # Errors
    /// When the bytes are truncated; when an opcode is unknown, has an operand of the wrong type, or needs a running
    /// Python (an extension code, an out-of-band buffer); when there are more than 2^22 values. Memory stays within a
    /// constant times the bytes read.
    pub fn read(bytes: &'a [u8]) -> Result<Self, PickleError> {
        interpreter::Interpreter::new(bytes).run()
    }

    /// Returns the id of the outermost value, the pickled object.
    pub fn root(&self) -> Id {
        self.root
    }

    /// Returns the length of the pickle in bytes, including its `STOP`.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Returns the value with this id.
    pub fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// Returns all values that the pickle creates, in order of creation.
    pub fn values(&self) -> &[Value<'a>] {
        &self.values
    }

    /// Returns the text of a string, or of a Python 2 string if it is valid UTF-8.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Str(text) => Some(text),
            Value::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// Returns the bytes of a bytes object or a Python 2 string. Protocols below 3 write bytes as a call of
    /// `_codecs.encode` with a string of Latin-1 characters, which is decoded too.
    pub fn bytes(&self, id: Id) -> Option<Cow<'_, [u8]>> {
        match self.get(id) {
            Value::Bytes(bytes) => Some(Cow::Borrowed(bytes)),
            Value::Object(object) => match (self.global(object.callable)?, self.elements(object.args)?) {
                (("_codecs", "encode"), &[text, codec]) if self.text(codec)? == "latin1" => {
                    let bytes = self.text(text)?.chars().map(|c| u8::try_from(u32::from(c)).ok());
                    bytes.collect::<Option<Vec<u8>>>().map(Cow::Owned)
                }
                (("__builtin__" | "builtins", "bytes"), []) => Some(Cow::Borrowed(&[])),
                _ => None,
            },
            _ => None,
        }
    }

    /// Returns the value of an integer that fits 64 bits.
    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Int(int) => Some(*int),
            _ => None,
        }
    }

    /// Returns the elements of a tuple, list or set. Protocols below 4 write a set as a call of `set` with a list,
    /// which is recognised too.
    pub fn elements(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(ids) | Value::List(ids) | Value::Set(ids) => Some(ids),
            Value::Object(object) => match (self.global(object.callable)?, self.get(object.args)) {
                (("__builtin__" | "builtins", "set" | "frozenset"), Value::Tuple(args)) => match args[..] {
                    [list] => match self.get(list) {
                        Value::List(ids) => Some(ids),
                        _ => None,
                    },
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        }
    }

    /// Returns the module and name of a class or function.
    pub fn global(&self, id: Id) -> Option<(&str, &str)> {
        match self.get(id) {
            Value::Global(global) => Some((&global.module, &global.name)),
            _ => None,
        }
    }

    /// Describes a value's type in a few words, for messages.
    pub fn kind(&self, id: Id) -> String {
        let name = |id| match self.global(id) {
            Some((module, name)) => shown(&format!("{module}.{name}")),
            None => "an unnamed callable".to_owned(),
        };
        match self.get(id) {
            Value::None => "None".to_owned(),
            Value::Bool(_) => "a bool".to_owned(),
            Value::Int(_) | Value::Long(_) => "an integer".to_owned(),
            Value::Float(value) => format!("the float {value}"),
            Value::Bytes(bytes) => format!("{} bytes", bytes.len()),
            Value::Str(_) => "a string".to_owned(),
            Value::Tuple(ids) => format!("a tuple of {}", ids.len()),
            Value::List(ids) => format!("a list of {}", ids.len()),
            Value::Set(ids) => format!("a set of {}", ids.len()),
            Value::Dict(items) => format!("a dict of {}", items.len()),
            Value::Global(_) => format!("the global {}", name(id)),
            Value::Object(object) => format!("a {}", name(object.callable)),
            Value::PersistentId(_) => "a persistent id".to_owned(),
        }
    }
}

/// Returns text from a file in a form safe for messages: control characters escaped, truncated to 60 characters.
pub fn shown(text: &str) -> String {
    let escaped = |text: &str| text.escape_debug().to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", escaped(&text[..end])),
        None => escaped(text),
    }
}
