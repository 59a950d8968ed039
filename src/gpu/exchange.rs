//! What GPUs of several ranks exchange: from device to device where they are connected, else through the memory of
//! their hosts.

use std::ops::Range;

use super::{Array, Element, GpuBackend, rows, update};
use crate::dist::{Collective, Ranks, Wire};
use crate::error::Result;
use crate::ops::backend::Backend;

/// Gradients on their way to a sum over all ranks.
pub(crate) enum Bucket {
    OnDevices(Sent),
    /// Through the host. The device would have to be waited for now, so they are sent when the sums are needed.
    ThroughHost {
        ranges: Vec<Range<usize>>,
        ranks: Ranks,
    },
}

/// Gradients that the devices add.
pub(crate) struct Sent {
    grads: Vec<Array>,
    /// Copies in bf16 that are added instead.
    short: Vec<Array>,
}

impl Drop for Sent {
    /// The arrays are only used again once they are added.
    fn drop(&mut self) {
        // An error shows at the next work of the device.
        let _ = self.grads.first().map(|grads| grads.device().gpu().await_collectives());
    }
}

/// Does a collective operation on the arrays of all ranks, f32, which are as long as each other.
///
/// # Errors
/// When the ranks cannot exchange them.
pub(super) fn collect(x: &Array, how: Collective, ranks: &Ranks) -> Result<Array> {
    let device = x.device();
    if ranks.is_single() {
        Ok(x.clone())
    } else if device.is_connected(ranks)? {
        device.collect(x, how, ranks.size())
    } else {
        Ok(device.upload(&ranks.collect(x.read()?, how)?)?)
    }
}

/// Replaces the values of an array, f32, by `share` times their sum over all ranks.
///
/// # Errors
/// When the ranks cannot exchange them.
pub(super) fn sum_in_place(x: &Array, share: f32, ranks: &Ranks) -> Result<()> {
    let sum = collect(x, Collective::Sum, ranks)?;
    Ok(update::blend(x, &sum, [0.0, share], None)?)
}

impl Bucket {
    /// Begins to add ranges of gradients, and their padding, over all ranks.
    ///
    /// # Errors
    /// When they cannot be sent.
    pub fn send(grads: &Array, ranges: Vec<Range<usize>>, ranks: &Ranks) -> Result<Self> {
        let device = grads.device();
        if ranks.is_single() || !device.is_connected(ranks)? {
            return Ok(Self::ThroughHost { ranges, ranks: ranks.clone() });
        }
        let parts: Vec<Array> = joined(ranges).map(|range| grads.part(range.start, range.len())).collect();
        let (element, short) = match ranks.wire() {
            Wire::F32 => (Element::F32, Vec::new()),
            Wire::Bf16 => {
                let short = parts.iter().map(|part| rows::in_type(part, Element::Bf16));
                (Element::Bf16, short.collect::<candle_core::Result<Vec<_>>>()?)
            }
        };
        let sent = Sent { grads: parts, short };
        let arrays = if sent.short.is_empty() { &sent.grads } else { &sent.short };
        // SAFETY: they are kept until they are added; the backward pass writes each range once, before it is sent.
        unsafe { device.begin_sum(element, arrays)? };
        Ok(Self::OnDevices(sent))
    }

    /// Writes the sums to the ranges they belong to; what is queued later waits for them.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn receive(self, backend: &GpuBackend, all: &Array) -> Result<()> {
        match self {
            Self::OnDevices(sent) => {
                backend.device.gpu().await_collectives()?;
                let Sent { grads, short } = &sent;
                Ok(short.iter().zip(grads).try_for_each(|(short, grads)| rows::convert(short, grads))?)
            }
            Self::ThroughHost { ranges, ranks } => {
                let parts: Vec<Array> = joined(ranges).map(|range| all.part(range.start, range.len())).collect();
                // One copy each way.
                let whole = backend.join(&parts.iter().collect::<Vec<_>>())?;
                whole.write(&ranks.sum(whole.read()?).wait()?)?;
                let mut next = 0;
                for part in &parts {
                    update::blend(part, &whole.part(next, part.len()), [0.0, 1.0], None)?;
                    next += part.len();
                }
                Ok(())
            }
        }
    }
}

/// Adds to each range the padding after it, and joins those that follow each other.
fn joined(mut ranges: Vec<Range<usize>>) -> impl Iterator<Item = Range<usize>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for Range { start, end } in ranges {
        let end = end.next_multiple_of(GpuBackend::ALIGNMENT);
        match joined.last_mut().filter(|last| last.end == start) {
            Some(last) => last.end = end,
            None => joined.push(start..end),
        }
    }
    joined.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::RanksConfig;
    use crate::dist::threads::on_ranks;
    use crate::gpu::tests::{are_connected, device_of_rank};

    #[test]
    fn arrays_of_all_ranks_are_collected() -> Result<()> {
        for size in [2, 3, 4] {
            for found in on_ranks(size, |ranks| -> Result<_> {
                let device = device_of_rank(ranks.rank());
                let mut all = Vec::new();
                for len in [size, 12 * size, 5000 * size] {
                    let values = |rank: usize| (0..len).map(move |i| (i % 97) as f32 - 3.0 * rank as f32);
                    let x = device.upload(&values(ranks.rank()).collect::<Vec<_>>())?;
                    for how in Collective::ALL {
                        let found = collect(&x, how, &ranks)?.read::<f32>()?;
                        let sum = |i: usize| (0..size).filter_map(|rank| values(rank).nth(i)).sum::<f32>();
                        let part = len / size;
                        let expected: Vec<f32> = match how {
                            Collective::Sum => (0..len).map(sum).collect(),
                            Collective::SumPart => (ranks.rank() * part..(ranks.rank() + 1) * part).map(sum).collect(),
                            Collective::Gather => (0..size).flat_map(values).collect(),
                            Collective::OfFirst => values(0).collect(),
                        };
                        assert!(found == expected, "{how:?} of {len} on {size} ranks");
                    }
                    sum_in_place(&x, 0.5, &ranks)?;
                    all.push(x.read::<f32>()?);
                }
                let odd = device.zeros(Element::F32, 2 * size + 1)?;
                assert!(collect(&odd, Collective::SumPart, &ranks).is_err());
                Ok((device.is_connected(&ranks)?, all))
            }) {
                let (is_connected, all) = found?;
                assert_eq!(is_connected, are_connected(size));
                let average = |i: usize| (0..size).map(|rank| (i % 97) as f32 - 3.0 * rank as f32).sum::<f32>() / 2.0;
                assert!(all.iter().all(|values| values.iter().enumerate().all(|(i, value)| *value == average(i))));
            }
        }
        Ok(())
    }

    #[test]
    fn buckets_are_added_while_the_device_computes() -> Result<()> {
        for gradients in [Wire::F32, Wire::Bf16] {
            let found = on_ranks(3, |ranks| -> Result<Vec<f32>> {
                let ranks = ranks.configured(&RanksConfig { gradients, ..RanksConfig::default() });
                let device = device_of_rank(ranks.rank());
                // Numbers of few bits, and so are their sums: bf16 has them.
                let values: Vec<f32> = (0..4000).map(|i| (i % 32 * (ranks.rank() + 1)) as f32).collect();
                let (given, grads) = (device.upload(&values)?, device.zeros(Element::F32, 4000)?);
                let mut buckets = Vec::new();
                // The second one has padding inside.
                for ranges in [&[3904..4000, 1904..2000][..], &[304..309, 0..304, 312..1500], &[1504..1504, 1504..1800]]
                {
                    for range in ranges {
                        let part = |array: &Array| array.part(range.start, range.len());
                        update::blend(&part(&grads), &part(&given), [0.0, 1.0], None)?;
                    }
                    buckets.push(Bucket::send(&grads, ranges.to_vec(), &ranks)?);
                }
                let backend = GpuBackend { device, element: Element::F32 };
                buckets.into_iter().try_for_each(|bucket| bucket.receive(&backend, &grads))?;
                Ok(grads.read()?)
            });
            for grads in found {
                for (i, found) in grads?.into_iter().enumerate() {
                    let is_sent = (0..309).contains(&i)
                        || [312..1500, 1504..1800, 1904..2000, 3904..4000].iter().any(|range| range.contains(&i));
                    assert_eq!(found, if is_sent { (i % 32 * 6) as f32 } else { 0.0 }, "{i}, {gradients:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_rank_that_takes_no_part_is_an_error_in_time() -> Result<()> {
        let found = on_ranks(2, |ranks| -> Result<Option<String>> {
            let ranks = ranks.configured(&RanksConfig { timeout_s: 1, ..RanksConfig::default() });
            let device = device_of_rank(ranks.rank());
            let x = device.zeros(Element::F32, 100)?;
            if !device.is_connected(&ranks)? {
                return Ok(None);
            }
            let sum = if ranks.is_first() { collect(&x, Collective::Sum, &ranks)? } else { x };
            Ok(Some(sum.read::<f32>().err().map(|e| e.to_string()).unwrap_or_default()))
        });
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;
        if are_connected(2) {
            let said = found[0].as_deref().expect("it is connected");
            assert!(said.contains("waited 1 s (ranks.timeout_s) for the others"), "{said}");
            assert_eq!(found[1].as_deref(), Some(""));
        } else {
            assert_eq!(found, [None, None]);
        }
        Ok(())
    }
}
