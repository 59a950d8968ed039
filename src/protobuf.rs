//! Reader and writer for the wire format of protocol buffers.

/// A field of a message: its number and value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
    /// Byte offset of the field in the file.
    pub(crate) offset: usize,
}

/// A field's value by wire type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes { bytes: &'a [u8], offset: usize },
    Fixed32([u8; 4]),
}

/// A violation of the wire format, and its byte offset in the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WireError {
    pub(crate) offset: usize,
    pub(crate) what: String,
}

pub(crate) type Result<T> = std::result::Result<T, WireError>;

/// Reader of one message's fields.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
    /// Byte offset of `bytes` in the file.
    start: usize,
}

impl<'a> Reader<'a> {
    /// Returns a reader of `bytes`, which start at byte `start` of the file.
    pub(crate) fn new(bytes: &'a [u8], start: usize) -> Self {
        Self { bytes, position: 0, start }
    }

    /// Returns the next field, or `None` at the end of the message.
    pub(crate) fn next(&mut self) -> Result<Option<Field<'a>>> {
        if self.position == self.bytes.len() {
            return Ok(None);
        }
        let offset = self.start + self.position;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|n| *n > 0);
        let Some(number) = number else {
            return Err(WireError { offset, what: format!("expected a field number, found {}", tag >> 3) });
        };
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(self.take(8)?.try_into().expect("eight bytes were taken")),
            2 => {
                let length = self.varint()?;
                let start = self.start + self.position;
                Value::Bytes { bytes: self.take(length)?, offset: start }
            }
            5 => Value::Fixed32(self.take(4)?.try_into().expect("four bytes were taken")),
            other => return Err(WireError { offset, what: format!("expected wire type 0, 1, 2 or 5, found {other}") }),
        };
        Ok(Some(Field { number, value, offset }))
    }

    /// Byte offset in the file of what is read next.
    pub(crate) fn offset(&self) -> usize {
        self.start + self.position
    }

    /// Returns the next varint of a packed field, or `None` at its end.
    pub(crate) fn next_varint(&mut self) -> Result<Option<u64>> {
        if self.position == self.bytes.len() { Ok(None) } else { self.varint().map(Some) }
    }

    fn varint(&mut self) -> Result<u64> {
        let offset = self.start + self.position;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes.get(self.position) else {
                return Err(WireError { offset, what: "expected a number, found the end of the message".into() });
            };
            self.position += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError { offset, what: "expected a number of up to 10 bytes, found more".into() })
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.position..];
        let taken = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| WireError {
            offset: self.start + self.position,
            what: format!("expected {length} bytes, found {} to the end of the message", rest.len()),
        })?;
        self.position += taken.len();
        Ok(taken)
    }
}

/// Writer of one message's fields.
#[derive(Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Appends an integer field.
    pub(crate) fn int(mut self, number: u32, value: i64) -> Self {
        self.tag(number, 0);
        self.varint(value as u64);
        self
    }

    /// Appends a 32-bit float field.
    pub(crate) fn float(mut self, number: u32, value: f32) -> Self {
        self.tag(number, 5);
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// Appends a 64-bit float field.
    pub(crate) fn double(mut self, number: u32, value: f64) -> Self {
        self.tag(number, 1);
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// Appends a field of bytes or text.
    pub(crate) fn bytes(mut self, number: u32, bytes: &[u8]) -> Self {
        self.tag(number, 2);
        self.varint(bytes.len() as u64);
        self.bytes.extend(bytes);
        self
    }

    /// Appends a message field.
    pub(crate) fn message(self, number: u32, message: Self) -> Self {
        self.bytes(number, &message.bytes)
    }

    /// Returns the encoded message.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn tag(&mut self, number: u32, wire_type: u64) {
        self.varint(u64::from(number) << 3 | wire_type);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let inner = Writer::default().bytes(1, b"abc");
        let bytes = Writer::default().int(1, -1).int(2, 300).float(3, 1.5).double(4, -2.5).message(16, inner).finish();
        let mut reader = Reader::new(&bytes, 0);
        let mut values = Vec::new();
        while let Some(field) = reader.next().unwrap() {
            values.push((field.number, field.value));
        }
        assert_eq!(
            values[..4],
            [
                (1, Value::Varint(u64::MAX)),
                (2, Value::Varint(300)),
                (3, Value::Fixed32(1.5f32.to_le_bytes())),
                (4, Value::Fixed64((-2.5f64).to_le_bytes())),
            ]
        );
        assert!(matches!(values[4], (16, Value::Bytes { bytes: b"\x0a\x03abc", .. })));
    }

    #[test]
    fn forged_lengths_and_endless_numbers_are_errors() {
        let read = |bytes: &[u8]| Reader::new(bytes, 100).next().map(drop).unwrap_err();
        assert_eq!(
            read(b"\x0a\xff\xff\xff\xff\x0fab").what,
            "expected 4294967295 bytes, found 2 to the end of the message"
        );
        assert_eq!(read(&[0xff; 11]).offset, 100);
        assert!(read(b"\x08").what.contains("end of the message"));
        assert!(read(b"\x0b").what.contains("wire type"));
        assert!(read(b"\x00\x00").what.contains("field number"));
    }
}
