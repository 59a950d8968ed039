//! The pickle virtual machine, without the ability to call anything.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::text::{raw_unicode, unquote};
use super::{Global, Id, Object, Pickle, PickleError, Value, shown};

/// Maximum number of values. No checkpoint or verification set has so many; at 32 bytes each, it bounds the memory that
/// a hostile file can use.
const MAX_VALUES: usize = 1 << 22;

/// Result of an operation; the error says why it failed.
type Step<T = ()> = Result<T, String>;

pub(super) struct Interpreter<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Stack heights at the open marks.
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

impl<'a> Interpreter<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: BTreeMap::new() }
    }

    pub(super) fn run(mut self) -> Result<Pickle<'a>, PickleError> {
        loop {
            let offset = self.at;
            let fail = |what| PickleError { offset, what };
            let [code] = self.array().map_err(|e| fail(format!("expected an opcode: {e}")))?;
            let in_opcode = |what| fail(format!("opcode 0x{code:02x} ('{}'): {what}", code.escape_ascii()));
            if code == b'.' {
                let root = self.pop().map_err(in_opcode)?;
                return Ok(Pickle { values: self.values, root, num_bytes: self.at });
            }
            self.step(code).map_err(in_opcode)?;
        }
    }

    fn step(&mut self, code: u8) -> Step {
        match code {
            // The protocol number is only checked: opcodes never changed their meaning.
            0x80 => match self.array()? {
                [0..=5] => Ok(()),
                [version] => Err(format!("expected a protocol of at most 5, found {version}")),
            },
            0x95 => self.length::<8>().and_then(|n| self.has(n)),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => match self.marks.last() {
                Some(mark) if *mark == self.stack.len() => self.pop_to_mark().map(drop),
                _ => self.pop().map(drop),
            },
            b'1' => self.pop_to_mark().map(drop),
            b'2' => self.top().map(|top| self.stack.push(top)),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'I' | b'L' | b'J' | b'K' | b'M' | b'F' | b'G' | 0x8a | 0x8b => {
                let number = self.number(code)?;
                self.push(number)
            }
            b'S' | b'T' | b'U' | b'B' | b'C' | 0x8e | 0x96 => {
                let bytes = self.byte_string(code)?;
                self.push(Value::Bytes(bytes))
            }
            b'V' | b'X' | 0x8c | 0x8d => {
                let text = self.text(code)?;
                self.push(Value::Str(text))
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            b']' => self.push(Value::List(Vec::new())),
            0x8f => self.push(Value::Set(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            0x85..=0x87 => self.pop_many(usize::from(code - 0x84)).and_then(|ids| self.push(Value::Tuple(ids))),
            b't' => self.pop_to_mark().and_then(|ids| self.push(Value::Tuple(ids))),
            b'l' => self.pop_to_mark().and_then(|ids| self.push(Value::List(ids))),
            0x91 => self.pop_to_mark().and_then(|ids| self.push(Value::Set(ids))),
            b'd' => self.pop_to_mark().and_then(pairs).and_then(|items| self.push(Value::Dict(items))),
            b'a' => self.pop_many(1).and_then(|ids| self.extend(ids)),
            b'e' | 0x90 => self.pop_to_mark().and_then(|ids| self.extend(ids)),
            b's' => self.pop_many(2).and_then(pairs).and_then(|items| self.set_items(items)),
            b'u' => self.pop_to_mark().and_then(pairs).and_then(|items| self.set_items(items)),
            b'g' | b'h' | b'j' => self.recall(code),
            b'p' | b'q' | b'r' | 0x94 => self.remember(code),
            b'P' => {
                let line = self.line()?;
                self.push(Value::Bytes(Cow::Borrowed(line)))?;
                let id = self.pop()?;
                self.push(Value::PersistentId(id))
            }
            b'Q' => self.pop().and_then(|id| self.push(Value::PersistentId(id))),
            b'c' | 0x93 | b'i' | b'o' | b'R' | 0x81 | 0x92 | b'b' => self.object_step(code),
            0x82..=0x84 => Err("extension codes are not supported".to_owned()),
            0x97 | 0x98 => Err("out-of-band buffers are not supported".to_owned()),
            _ => Err("unknown opcode".to_owned()),
        }
    }

    /// Executes an opcode for globals, calls (which are only recorded) or object state.
    fn object_step(&mut self, code: u8) -> Step {
        match code {
            b'c' => {
                let global = self.global_lines()?;
                self.push(global)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let text = |id: Id| match &self.values[id.0 as usize] {
                    Value::Str(text) => Ok(text.clone()),
                    _ => Err("expected a module and a name, found something else".to_owned()),
                };
                // Real names are short. A long one would be copied each time it is used, so its length is bounded.
                let global = Global { module: short(text(module)?)?, name: short(text(name)?)? };
                self.push(Value::Global(Box::new(global)))
            }
            b'i' => {
                let global = self.global_lines()?;
                let args = self.pop_to_mark()?;
                self.push(global)?;
                let callable = self.pop()?;
                self.push(Value::Tuple(args))?;
                let args = self.pop()?;
                self.push_object(callable, args)
            }
            b'o' => {
                let mut ids = self.pop_to_mark()?;
                if ids.is_empty() {
                    return Err("expected a class, found nothing".to_owned());
                }
                let callable = ids.remove(0);
                self.push(Value::Tuple(ids))?;
                let args = self.pop()?;
                self.push_object(callable, args)
            }
            b'b' => {
                let state = self.pop()?;
                let top = self.top()?;
                match &mut self.values[top.0 as usize] {
                    Value::Object(object) if object.state.is_none() => {
                        object.state = Some(state);
                        Ok(())
                    }
                    Value::Object(_) => Err("the object already has a state".to_owned()),
                    _ => Err("expected an object to give a state to, found something else".to_owned()),
                }
            }
            // REDUCE, NEWOBJ, NEWOBJ_EX
            _ => {
                if code == 0x92 {
                    self.pop()?;
                }
                let (args, callable) = (self.pop()?, self.pop()?);
                self.push_object(callable, args)
            }
        }
    }

    fn push_object(&mut self, callable: Id, args: Id) -> Step {
        let Value::Tuple(_) = self.values[args.0 as usize] else {
            return Err("expected a tuple of arguments, found something else".to_owned());
        };
        self.push(Value::Object(Box::new(Object { callable, args, state: None, elements: vec![], items: vec![] })))
    }

    fn global_lines(&mut self) -> Step<Value<'a>> {
        let mut line = || {
            let line = self.line()?;
            std::str::from_utf8(line).map(Cow::Borrowed).map_err(|e| format!("a name is not UTF-8: {e}"))
        };
        Ok(Value::Global(Box::new(Global { module: line()?, name: line()? })))
    }

    fn number(&mut self, code: u8) -> Step<Value<'a>> {
        Ok(match code {
            b'K' => Value::Int(i64::from(u8::from_le_bytes(self.array()?))),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.array()?))),
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.array()?))),
            b'G' => Value::Float(f64::from_be_bytes(self.array()?)),
            b'F' => Value::Float(self.parsed_line("a float", "")?),
            b'L' => Value::Int(self.parsed_line("an integer of 64 bits", "L")?),
            b'I' => match self.bytes.get(self.at..self.at + 3) {
                Some(bool @ (b"00\n" | b"01\n")) => {
                    self.at += 3;
                    Value::Bool(bool == b"01\n")
                }
                _ => Value::Int(self.parsed_line("an integer of 64 bits", "")?),
            },
            _ => {
                let length = if code == 0x8a { self.length::<1>()? } else { self.length::<4>()? };
                let bytes = self.take(length)?;
                let is_negative = bytes.last().is_some_and(|b| *b >= 0x80);
                let mut word = [if is_negative { 0xff } else { 0 }; 8];
                match word.get_mut(..bytes.len()) {
                    Some(low) => {
                        low.copy_from_slice(bytes);
                        Value::Int(i64::from_le_bytes(word))
                    }
                    None => Value::Long(bytes),
                }
            }
        })
    }

    fn byte_string(&mut self, code: u8) -> Step<Cow<'a, [u8]>> {
        if code == b'S' {
            let line = self.line()?;
            let wrong = || format!("expected a quoted string, found {}", shown(&String::from_utf8_lossy(line)));
            return unquote(line).map(Cow::Owned).ok_or_else(wrong);
        }
        let length = match code {
            b'U' | b'C' => self.length::<1>()?,
            b'T' | b'B' => self.length::<4>()?,
            _ => self.length::<8>()?,
        };
        self.take(length).map(Cow::Borrowed)
    }

    fn text(&mut self, code: u8) -> Step<Cow<'a, str>> {
        if code == b'V' {
            let line = self.line()?;
            let wrong = || format!("expected Unicode escapes, found {}", shown(&String::from_utf8_lossy(line)));
            return raw_unicode(line).map(Cow::Owned).ok_or_else(wrong);
        }
        let length = match code {
            0x8c => self.length::<1>()?,
            b'X' => self.length::<4>()?,
            _ => self.length::<8>()?,
        };
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map(Cow::Borrowed).map_err(|e| format!("the string is not UTF-8: {e}"))
    }

    fn recall(&mut self, code: u8) -> Step {
        let key = self.memo_key(code)?;
        let id = *self.memo.get(&key).ok_or_else(|| format!("no memo entry {key}"))?;
        self.stack.push(id);
        Ok(())
    }

    fn remember(&mut self, code: u8) -> Step {
        let key = if code == 0x94 { self.memo.len() as u32 } else { self.memo_key(code)? };
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn memo_key(&mut self, code: u8) -> Step<u32> {
        match code {
            b'h' | b'q' => Ok(u32::from(u8::from_le_bytes(self.array()?))),
            b'j' | b'r' => Ok(u32::from_le_bytes(self.array()?)),
            _ => self.parsed_line("an integer of 32 bits", ""),
        }
    }

    /// Appends to the value on top of the stack.
    fn extend(&mut self, ids: Vec<Id>) -> Step {
        let top = self.top()?;
        match &mut self.values[top.0 as usize] {
            Value::List(list) | Value::Set(list) => list.extend(ids),
            Value::Object(object) => object.elements.extend(ids),
            _ => return Err("expected a list or an object to append to, found something else".to_owned()),
        }
        Ok(())
    }

    /// Sets items of the value on top of the stack.
    fn set_items(&mut self, items: Vec<(Id, Id)>) -> Step {
        let top = self.top()?;
        match &mut self.values[top.0 as usize] {
            Value::Dict(dict) => dict.extend(items),
            Value::Object(object) => object.items.extend(items),
            _ => return Err("expected a dict or an object to set items of, found something else".to_owned()),
        }
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) -> Step {
        if self.values.len() == MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.stack.push(Id(self.values.len() as u32));
        self.values.push(value);
        Ok(())
    }

    /// Returns the lowest height to which the stack may be popped.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Step<Id> {
        self.stack[self.floor()..].last().copied().ok_or_else(|| "the stack is empty".to_owned())
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_many(&mut self, count: usize) -> Step<Vec<Id>> {
        let found = self.stack.len() - self.floor();
        if found < count {
            return Err(format!("expected {count} values on the stack, found {found}"));
        }
        Ok(self.stack.drain(self.stack.len() - count..).collect())
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        // Not `split_off`, which may return a vector with the capacity of the whole stack.
        Ok(self.stack.drain(mark..).collect())
    }

    /// Fails unless at least `length` bytes remain.
    fn has(&self, length: usize) -> Step {
        let left = self.bytes.len() - self.at;
        if length > left { Err(format!("expected {length} more bytes, found {left}")) } else { Ok(()) }
    }

    fn take(&mut self, length: usize) -> Step<&'a [u8]> {
        self.has(length)?;
        let taken = &self.bytes[self.at..self.at + length];
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        self.take(N).map(|bytes| bytes.try_into().expect("N bytes were taken"))
    }

    /// Reads a little-endian length of `N` bytes.
    fn length<const N: usize>(&mut self) -> Step<usize> {
        let mut word = [0; 8];
        word[..N].copy_from_slice(&self.array::<N>()?);
        usize::try_from(u64::from_le_bytes(word)).map_err(|e| e.to_string())
    }

    /// Reads the bytes up to a line feed, which is consumed too.
    fn line(&mut self) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|b| *b == b'\n').ok_or("expected a line, found no line feed")?;
        self.at += length + 1;
        Ok(&rest[..length])
    }

    fn parsed_line<T: std::str::FromStr>(&mut self, expected: &str, suffix: &str) -> Step<T> {
        let line = String::from_utf8_lossy(self.line()?);
        let number = line.strip_suffix(suffix).unwrap_or(&line);
        number.parse().map_err(|_| format!("expected {expected}, found {}", shown(&line)))
    }
}

fn pairs(ids: Vec<Id>) -> Step<Vec<(Id, Id)>> {
    let (pairs, rest) = ids.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(format!("expected keys with values, found {} values", ids.len()));
    }
    Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
}

fn short(text: Cow<'_, str>) -> Step<Cow<'_, str>> {
    if text.len() > 1024 { Err(format!("a name of {} bytes, expected at most 1024", text.len())) } else { Ok(text) }
}
