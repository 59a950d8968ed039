//! Literals of the text-based protocols.

/// Decodes a quoted Python 2 string with escapes, as written by `repr`, to its bytes.
pub(super) fn unquote(text: &[u8]) -> Option<Vec<u8>> {
    let quote = text.first().filter(|q| matches!(q, b'\'' | b'"'))?;
    let mut rest = text.get(1..)?.strip_suffix(&[*quote])?.iter().copied().peekable();
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next()? {
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'x' => {
                let digits = [rest.next()?, rest.next()?];
                u8::try_from(hex(&digits)?).ok()?
            }
            other @ (b'\\' | b'\'' | b'"') => other,
            _ => return None,
        });
    }
    Some(bytes)
}

/// Decodes a `raw-unicode-escape` line: Latin-1 with `\uXXXX` and `\UXXXXXXXX` escapes.
pub(super) fn raw_unicode(line: &[u8]) -> Option<String> {
    let mut text = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((&byte, after)) = rest.split_first() {
        let num_digits = match (byte, after.first()) {
            (b'\\', Some(b'u')) => 4,
            (b'\\', Some(b'U')) => 8,
            _ => 0,
        };
        if num_digits == 0 {
            text.push(char::from(byte));
            rest = after;
        } else {
            text.push(char::from_u32(hex(after.get(1..=num_digits)?)?)?);
            rest = &after[num_digits + 1..];
        }
    }
    Some(text)
}

fn hex(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |value: u32, &d| Some(value.checked_mul(16)? + char::from(d).to_digit(16)?))
}
