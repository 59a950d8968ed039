//! Ranks on the threads of this process, for tests.

use std::sync::{Arc, Barrier, Mutex, PoisonError};

use super::transport::Primitives;
use super::{Operation, Ranks, Transport};
use crate::error::Result;

/// Where the ranks put what they give.
struct Table {
    given: Vec<Mutex<Vec<u8>>>,
    barrier: Barrier,
}

struct Thread {
    table: Arc<Table>,
    rank: usize,
}

impl Transport for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.table.given.len()
    }

    fn post(&self, operation: Operation) {
        operation.run(self);
    }
}

impl Thread {
    fn sums(&self, values: &[f32]) -> Result<Vec<f32>> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut sums = vec![0f32; values.len()];
        for of_rank in self.gather(&bytes)? {
            let of_rank = of_rank.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            sums.iter_mut().zip(of_rank).for_each(|(sum, value)| *sum += value);
        }
        Ok(sums)
    }
}

impl Primitives for Thread {
    fn size(&self) -> usize {
        self.table.given.len()
    }

    fn sum(&self, values: &mut Vec<f32>) -> Result<()> {
        *values = self.sums(values)?;
        Ok(())
    }

    fn sum_part(&self, values: &[f32]) -> Result<Vec<f32>> {
        let part = values.len() / self.table.given.len();
        Ok(self.sums(values)?[self.rank * part..][..part].to_vec())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        *self.table.given[self.rank].lock().unwrap_or_else(PoisonError::into_inner) = bytes.to_vec();
        self.table.barrier.wait();
        let taken = |given: &Mutex<Vec<u8>>| given.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all = self.table.given.iter().map(taken).collect();
        // Nobody gives anew before all have taken.
        self.table.barrier.wait();
        Ok(all)
    }

    fn exchange(&self, values: &[u16]) -> Result<Vec<u16>> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let part = values.len() / self.table.given.len();
        let all = self.gather(&bytes)?;
        let parts = all.iter().flat_map(|bytes| &bytes.as_chunks().0[self.rank * part..][..part]);
        Ok(parts.map(|bytes| u16::from_le_bytes(*bytes)).collect())
    }
}

/// Returns what each of `size` ranks returns, each on a thread of its own.
pub(crate) fn on_ranks<T: Send>(size: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let given = (0..size).map(|_| Mutex::default()).collect();
    let table = Arc::new(Table { given, barrier: Barrier::new(size) });
    std::thread::scope(|scope| {
        let ranks = (0..size).map(|rank| Ranks::over(Arc::new(Thread { table: table.clone(), rank })));
        // A rank that waits must not hold up a thread that another one computes on.
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        let work = &work;
        let threads: Vec<_> = ranks.map(|ranks| scope.spawn(move || pool().install(|| work(ranks)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's work does not panic")).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::{Collective, RanksConfig, Wire};

    #[test]
    fn all_ranks_get_what_each_gave() -> Result<()> {
        for size in [1, 2, 3, 5] {
            let found = on_ranks(size, |ranks| -> Result<_> {
                let rank = ranks.rank() as f32;
                let sum = ranks.sum(vec![rank, 1.0, 0.5]).wait()?;
                let part = ranks.collect((0..2 * size).map(|i| i as f32 + rank).collect(), Collective::SumPart)?;
                assert_eq!(ranks.collect(vec![rank, 7.0], Collective::OfFirst)?, [0.0, 7.0]);
                assert_eq!(ranks.collect(vec![1.0], Collective::Sum)?, [size as f32]);
                assert_eq!(ranks.collect(vec![1.0, 2.0], Collective::Gather)?, [1.0, 2.0].repeat(size));
                assert!(size == 1 || ranks.collect(vec![0.0; 2 * size + 1], Collective::SumPart).is_err());
                let joined = ranks.join_f32(&vec![rank; ranks.rank()])?;
                let mut total = [0.1 * f64::from(rank), f64::NAN];
                ranks.total(&mut total)?;
                assert!(total[1].is_nan());
                let text = ranks.of_first(&format!("rank {rank}"))?;
                Ok((sum, part, joined, total[0], text, ranks.any(ranks.rank() == 1)?))
            });
            let sum_of_ranks = (0..size).sum::<usize>() as f32;
            for (rank, found) in found.into_iter().enumerate() {
                let (sum, part, joined, total, text, any) = found?;
                assert_eq!(sum, [sum_of_ranks, size as f32, 0.5 * size as f32]);
                let expected = [2 * rank, 2 * rank + 1].map(|i| (i * size) as f32 + sum_of_ranks);
                assert_eq!(part, expected);
                let joined_of: Vec<f32> = (0..size).flat_map(|rank| vec![rank as f32; rank]).collect();
                assert_eq!(joined, joined_of);
                assert!((total - 0.1 * f64::from(sum_of_ranks)).abs() < 1e-12);
                assert_eq!((text.as_str(), any), ("rank 0", size > 1));
            }
        }
        Ok(())
    }

    #[test]
    fn sums_of_bf16_are_rounded_and_the_same_everywhere() -> Result<()> {
        let config = RanksConfig { gradients: Wire::Bf16, ..RanksConfig::default() };
        let values = |rank: usize| (0..7).map(move |i| (i as f32 + 0.37) * (rank as f32 + 1.0) - 3.3);
        let found = on_ranks(3, |ranks| {
            let ranks = ranks.configured(&config);
            ranks.sum(values(ranks.rank()).collect()).wait()
        });
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;
        assert!(found.iter().all(|of_rank| of_rank == &found[0]));
        for (i, found) in found[0].iter().enumerate() {
            let expected: f32 = (0..3).filter_map(|rank| values(rank).nth(i)).sum();
            assert!((found - expected).abs() < 0.03 * expected.abs().max(1.0), "{found}, expected {expected}");
        }
        Ok(())
    }

    #[test]
    fn a_rank_that_differs_is_named_on_all() {
        let said = on_ranks(3, |ranks| {
            let mine = format!("a = 1\nb = {}", if ranks.rank() == 2 { 3 } else { 2 });
            (ranks.agree("settings", "the same").is_ok(), ranks.agree("settings", &mine).map_err(|e| e.to_string()))
        });
        for (is_same, said) in said {
            assert!(is_same);
            let said = said.expect_err("rank 2 differs");
            assert!(said.contains("same settings: rank 0 has \"b = 2\", rank 2 has \"b = 3\""), "{said}");
        }
    }
}
