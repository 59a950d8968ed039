//! Framing and header of a record.

use std::io::{self, Write};

use crate::data::formats::file::RandomFile;
use crate::error::Result;

/// Magic number at the start of every part of a record.
const MAGIC: u32 = 0xced7_230a;
/// The magic number as bytes.
const MAGIC_BYTES: [u8; 4] = MAGIC.to_le_bytes();
/// Most bytes of a part: its length has 29 bits.
const MAX_PART: usize = (1 << 29) - 1;
/// Bytes read at once; most records of 112x112 crops fit.
const READ_AHEAD: usize = 16 << 10;
/// Size of a header without labels, in bytes.
const HEADER: usize = 24;

/// Header of a record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    /// The label, or the list of labels.
    pub labels: Vec<f32>,
    /// Whether the labels follow the header as a list.
    pub is_list: bool,
    /// The record's key.
    pub id: u64,
}

/// Kind of a part of a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole = 0,
    First = 1,
    Middle = 2,
    Last = 3,
}

/// Returns the bytes of the record at `offset`, and the offset of the next one.
pub(super) fn read_record(file: &RandomFile, offset: u64) -> Result<(Vec<u8>, u64)> {
    let (mut record, mut at) = (Vec::new(), offset);
    loop {
        let ahead = file.read_up_to(at, READ_AHEAD)?;
        let (part, len) = part_at(file, at, &ahead)?;
        let is_expected = matches!(part, Part::Whole | Part::First) == (at == offset);
        if !is_expected {
            let what = if at == offset { "the start of a record" } else { "the next part of a record" };
            return Err(file.error(at, format!("expected {what}, found part {}", part as u8)));
        }
        match ahead.get(8..8 + len) {
            Some(bytes) => record.extend_from_slice(bytes),
            None => record.append(&mut file.read(at + 8, len)?),
        }
        at += padded(len);
        if matches!(part, Part::Whole | Part::Last) {
            return Ok((record, at));
        }
        // Records are split where they contain the magic number, which is left out.
        record.extend_from_slice(&MAGIC_BYTES);
    }
}

/// Returns the offset of the record after the one at `offset`, reading only the parts' frames.
pub(super) fn skip_record(file: &RandomFile, offset: u64) -> Result<u64> {
    let mut at = offset;
    loop {
        let (part, len) = part_at(file, at, &file.read_up_to(at, 8)?)?;
        if matches!(part, Part::Whole | Part::First) != (at == offset) {
            return Err(file.error(at, format!("expected a record's parts in order, found part {}", part as u8)));
        }
        at += padded(len);
        if at > file.len() {
            return Err(
                file.error(at, format!("expected the rest of a record, found the end of the file at {}", file.len()))
            );
        }
        if matches!(part, Part::Whole | Part::Last) {
            return Ok(at);
        }
    }
}

/// Returns the header of the record at `offset`, and whether an image follows it.
pub(super) fn read_header(file: &RandomFile, offset: u64) -> Result<(Header, bool)> {
    let start = file.read_up_to(offset, 8 + HEADER + 16)?;
    let (part, len) = part_at(file, offset, &start)?;
    // The whole record is read if the header is split into parts or has more labels than were read.
    let is_here = part == Part::Whole && (8 + len <= start.len() || len >= HEADER + 16);
    let flag = start.get(8..12).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if is_here && flag <= 4 {
        let end = start.len().min(8 + len);
        let (header, used) = Header::parse(&start[8..end]).map_err(|what| file.error(offset + 8, what))?;
        return Ok((header, len > used));
    }
    let (record, _) = read_record(file, offset)?;
    let (header, used) = Header::parse(&record).map_err(|what| file.error(offset + 8, what))?;
    Ok((header, record.len() > used))
}

/// Returns the kind and length of the part at the start of `bytes`, which were read at `offset`.
fn part_at(file: &RandomFile, offset: u64, bytes: &[u8]) -> Result<(Part, usize)> {
    let word = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let (Some(magic), Some(word)) = (word(0), word(4)) else {
        return Err(file.error(offset, format!("expected a record, found the end of the file at {}", file.len())));
    };
    if magic != MAGIC {
        return Err(file.error(offset, format!("expected the start of a record, {MAGIC:#010x}, found {magic:#010x}")));
    }
    let part = match word >> 29 {
        0 => Part::Whole,
        1 => Part::First,
        2 => Part::Middle,
        3 => Part::Last,
        other => return Err(file.error(offset + 4, format!("expected a part from 0 to 3, found {other}"))),
    };
    Ok((part, word as usize & MAX_PART))
}

/// Size in the file of a part of `len` bytes, with frame and padding.
fn padded(len: usize) -> u64 {
    8 + len.next_multiple_of(4) as u64
}

impl Header {
    /// Returns the header at the start of a record, and its length.
    pub fn parse(record: &[u8]) -> std::result::Result<(Self, usize), String> {
        let short = || format!("expected a header of {HEADER} bytes and its labels, found {} bytes", record.len());
        let head = record.get(..HEADER).ok_or_else(short)?;
        let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let id = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
        let num_labels = u32_at(0) as usize;
        if num_labels == 0 {
            let labels = vec![f32::from_bits(u32_at(4))];
            return Ok((Self { labels, is_list: false, id }, HEADER));
        }
        let end = num_labels.checked_mul(4).and_then(|bytes| bytes.checked_add(HEADER));
        let bytes = end.and_then(|end| record.get(HEADER..end)).ok_or_else(short)?;
        let labels = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok((Self { labels, is_list: true, id }, HEADER + bytes.len()))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let (flag, label) = if self.is_list { (self.labels.len() as u32, 0.0) } else { (0, self.labels[0]) };
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend_from_slice(&flag.to_le_bytes());
        bytes.extend_from_slice(&label.to_le_bytes());
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]); // the second id, which nobody uses
        if self.is_list {
            self.labels.iter().for_each(|label| bytes.extend_from_slice(&label.to_le_bytes()));
        }
        bytes
    }
}

/// Writes a record, split into parts where it contains the magic number. Returns the number of bytes written.
pub(super) fn write_record(out: &mut impl Write, header: &Header, image: &[u8]) -> io::Result<u64> {
    let mut record = header.to_bytes();
    record.extend_from_slice(image);
    let cuts: Vec<usize> =
        (0..record.len() / 4).map(|i| 4 * i).filter(|&at| record[at..at + 4] == MAGIC_BYTES).collect();
    let (mut start, mut written) = (0, 0);
    for &cut in &cuts {
        let part = if start == 0 { Part::First } else { Part::Middle };
        written += write_part(out, part, &record[start..cut])?;
        start = cut + 4;
    }
    let part = if cuts.is_empty() { Part::Whole } else { Part::Last };
    Ok(written + write_part(out, part, &record[start..])?)
}

fn write_part(out: &mut impl Write, part: Part, bytes: &[u8]) -> io::Result<u64> {
    if bytes.len() > MAX_PART {
        let what = format!("a record of {} bytes: expected at most {MAX_PART}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    out.write_all(&MAGIC_BYTES)?;
    out.write_all(&((part as u32) << 29 | bytes.len() as u32).to_le_bytes())?;
    out.write_all(bytes)?;
    out.write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])?;
    Ok(padded(bytes.len()))
}
