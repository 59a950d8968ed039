//! The orientation that EXIF data gives an image.

use image::metadata::Orientation;

/// Tag of the orientation in a directory.
const ORIENTATION: u16 = 0x0112;
/// Types of values: whole numbers of one, two and four bytes, without and with a sign.
const BYTES: [u16; 2] = [1, 6];
const SHORTS: [u16; 2] = [3, 8];
const LONGS: [u16; 2] = [4, 9];

/// Returns the orientation in EXIF data, a TIFF header with directories; none if it has none that is valid. The
/// orientation is a number of two bytes by the standard; some cameras write another type.
pub(super) fn orientation(exif: &[u8]) -> Option<Orientation> {
    let is_little_endian = match exif.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let bytes: [u8; 2] = exif.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if is_little_endian { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    };
    let long = |at: usize| {
        let bytes: [u8; 4] = exif.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(if is_little_endian { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    };
    let directory = usize::try_from(long(4)?).ok()?;
    (0..usize::from(short(directory)?)).find_map(|number| {
        let entry = directory.checked_add(2 + 12 * number)?;
        if short(entry)? != ORIENTATION {
            return None;
        }
        let kind = short(entry + 2)?;
        let value = match () {
            () if BYTES.contains(&kind) => u32::from(*exif.get(entry + 8)?),
            () if SHORTS.contains(&kind) => u32::from(short(entry + 8)?),
            () if LONGS.contains(&kind) => long(entry + 8)?,
            () => return None,
        };
        Orientation::from_exif(u8::try_from(value).ok()?)
    })
}
