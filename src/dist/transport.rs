//! Operations, made of what a transport does.

use half::bf16;

use super::{Operation, Wire};
use crate::error::Result;

/// What a transport does, one operation after the other.
pub(super) trait Primitives {
    fn size(&self) -> usize;
    /// Replaces values by their sum over all ranks, the same bits on each.
    fn sum(&self, values: &mut Vec<f32>) -> Result<()>;
    /// Returns this rank's part of the sum over all ranks.
    fn sum_part(&self, values: &[f32]) -> Result<Vec<f32>>;
    /// Returns the bytes of each rank.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Returns this rank's part of each rank's values, in the order of the ranks.
    fn exchange(&self, values: &[u16]) -> Result<Vec<u16>>;
}

impl Operation {
    /// Does the operation, and hands over its result unless nobody waits for it any more.
    pub(super) fn run(self, by: &dyn Primitives) {
        match self {
            Self::Sum(mut values, Wire::F32, reply) => {
                let _ = reply.send(by.sum(&mut values).map(|()| values));
            }
            Self::Sum(values, Wire::Bf16, reply) => {
                let _ = reply.send(sum_bf16(values, by));
            }
            Self::SumPart(values, reply) => {
                let _ = reply.send(by.sum_part(&values));
            }
            Self::Gather(bytes, reply) => {
                let _ = reply.send(by.gather(&bytes));
            }
        }
    }
}

/// Adds values that travel as bf16: each rank adds one part of them in f32, in the order of the ranks, and sends it,
/// rounded, to all.
fn sum_bf16(mut values: Vec<f32>, by: &dyn Primitives) -> Result<Vec<f32>> {
    let len = values.len();
    values.resize(len.next_multiple_of(by.size()), 0.0);
    let part = values.len() / by.size();
    let short: Vec<u16> = values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
    let mut sums = vec![0f32; part];
    for of_rank in by.exchange(&short)?.chunks_exact(part.max(1)) {
        sums.iter_mut().zip(of_rank).for_each(|(sum, bits)| *sum += bf16::from_bits(*bits).to_f32());
    }
    let bytes: Vec<u8> = sums.iter().flat_map(|sum| bf16::from_f32(*sum).to_bits().to_le_bytes()).collect();
    let all = by.gather(&bytes)?;
    let bits = all.iter().flat_map(|bytes| bytes.as_chunks().0).map(|bytes| u16::from_le_bytes(*bytes));
    values.clear();
    values.extend(bits.map(|bits| bf16::from_bits(bits).to_f32()).take(len));
    Ok(values)
}
