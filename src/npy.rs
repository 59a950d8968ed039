//! NumPy's `.npy` files.

use std::path::Path;

use crate::error::{Error, Result};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Returns the numbers of a `.npy` file with one axis of floats, integers or booleans.
///
/// # Errors
/// When it cannot be read or is not such a file. No allocation depends on the sizes that the header claims.
pub(crate) fn read(path: &Path) -> Result<Vec<f64>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let error = |offset: usize, what: String| Error::Format { path: path.to_owned(), offset: offset as u64, what };
    let found = bytes.get(..MAGIC.len()).unwrap_or(&bytes);
    if found != MAGIC {
        return Err(error(0, format!("expected a .npy file, found {found:02x?}")));
    }
    // The length of the header takes two bytes in version 1, four in later versions.
    let len_size = if bytes.get(6) == Some(&1) { 2 } else { 4 };
    let len = bytes.get(8..8 + len_size).map(|len| len.iter().rev().fold(0, |sum, &b| sum << 8 | usize::from(b)));
    let start = 8 + len_size;
    let header = len.and_then(|len| bytes.get(start..start.checked_add(len)?));
    let header = header.and_then(|header| std::str::from_utf8(header).ok());
    let Some(header) = header else { return Err(error(8, "the header is truncated or not text".to_owned())) };
    let field = |name: &str| header.split_once(&format!("'{name}':")).map(|(_, rest)| rest.trim_start());
    let kind = field("descr").and_then(|rest| rest.strip_prefix('\'')?.split('\'').next());
    let shape = field("shape").and_then(|rest| rest.strip_prefix('(')?.split(')').next()).unwrap_or_default();
    let mut axes = shape.split(',').map(str::trim).filter(|axis| !axis.is_empty());
    let num = match (axes.next().map(str::parse::<usize>), axes.next()) {
        (Some(Ok(num)), None) => num,
        _ => return Err(error(start, format!("expected one axis, found the shape ({shape})"))),
    };
    let data = &bytes[start + header.len()..];
    let number: (usize, fn(&[u8]) -> f64) = match kind {
        Some("<f8") => (8, |b| f64::from_le_bytes(array(b))),
        Some("<f4") => (4, |b| f64::from(f32::from_le_bytes(array(b)))),
        Some("<f2") => (2, |b| half::f16::from_le_bytes(array(b)).to_f64()),
        Some("<i8") => (8, |b| i64::from_le_bytes(array(b)) as f64),
        Some("<i4") => (4, |b| f64::from(i32::from_le_bytes(array(b)))),
        Some("|b1" | "|u1") => (1, |b| f64::from(b[0])),
        _ => {
            let kind = kind.unwrap_or("nothing");
            return Err(error(start, format!("expected <f2, <f4, <f8, <i4, <i8, |b1 or |u1, found {kind}")));
        }
    };
    let (size, number) = number;
    if data.len() / size != num || data.len() % size != 0 {
        let what = format!("expected {num} numbers of {size} bytes, found {} bytes", data.len());
        return Err(error(start + header.len(), what));
    }
    Ok(data.chunks_exact(size).map(number).collect())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the pieces are as long as the number")
}

/// Returns a file of version 1.0 (numpy.lib.format) with an array of dtype `kind`, such as `<f4`, and `shape`,
/// row-major.
pub(crate) fn encode(kind: &str, shape: &[usize], data: impl IntoIterator<Item = u8>) -> Vec<u8> {
    // A Python tuple of one element has a comma.
    let axes: String = shape.iter().map(|axis| format!("{axis}, ")).collect();
    let axes = if shape.len() == 1 { axes.trim_end() } else { axes.trim_end_matches(", ") };
    let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({axes}), }}");
    // Magic, version and length take ten bytes; the data starts at a multiple of 64, after a line feed.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    let mut bytes = [MAGIC, b"\x01\x00"].concat();
    bytes.extend((padded as u16).to_le_bytes());
    bytes.extend(format!("{header:<width$}\n", width = padded - 1).bytes());
    bytes.extend(data);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_reads_back_and_what_is_cut_off_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        let values = [0.25, -1.0, f64::MIN_POSITIVE, 3e300];
        let file = encode("<f8", &[4], values.iter().flat_map(|v| v.to_le_bytes()));
        std::fs::write(&path, file).unwrap();
        assert_eq!(read(&path).unwrap(), values);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len() - 32) % 64, 0);
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(read(&path).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn forged_headers_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        let error = |header: &str| {
            let mut bytes = [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
            bytes.extend([0; 8]);
            std::fs::write(&path, bytes).unwrap();
            read(&path).unwrap_err().to_string()
        };
        assert!(error("{'descr': '<f8', 'shape': (99999999999999,), }").contains("expected 99999999999999 numbers"));
        assert!(error("{'descr': '<f8', 'shape': (2, 3), }").contains("one axis"));
        assert!(error("{'descr': '|O', 'shape': (1,), }").contains("|O"));
        assert!(error("{}").contains("one axis"));
    }
}
