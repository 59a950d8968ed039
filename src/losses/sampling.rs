//! Sampled classes of the margin loss: PartialFC (An et al., CVPR 2022).

use rand::seq::index;
use rand_chacha::ChaCha8Rng;

/// Returns the classes of a step, in ascending order: those of `labels`, of which -1 is none, and random others, all
/// with the same probability, up to the share `rate` of the `num_classes` classes, at least one. The classes of the
/// labels are all there, even if they are more.
pub(crate) fn sample_classes(labels: &[i64], num_classes: usize, rate: f64, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut positive: Vec<u32> = labels.iter().filter_map(|label| u32::try_from(*label).ok()).collect();
    positive.sort_unstable();
    positive.dedup();
    let num_others = num_classes - positive.len();
    // A softmax needs a class.
    let wanted = ((rate * num_classes as f64) as usize).max(1).saturating_sub(positive.len()).min(num_others);
    let mut others: Vec<u32> = index::sample(rng, num_others, wanted).into_iter().map(|i| i as u32).collect();
    others.sort_unstable();
    // The number of an other class counts from below only classes that are not positive.
    let (mut passed, mut classes) = (0, Vec::with_capacity(positive.len() + wanted));
    for other in others {
        while positive.get(passed).is_some_and(|positive| *positive <= other + passed as u32) {
            classes.push(positive[passed]);
            passed += 1;
        }
        classes.push(other + passed as u32);
    }
    classes.extend(&positive[passed..]);
    classes
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn a_sample_has_the_labels_and_others_alike() {
        let labels = [7, 3, -1, 7, 19, 0];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0; 20];
        for _ in 0..4000 {
            let classes = sample_classes(&labels, 20, 0.5, &mut rng);
            assert_eq!(classes.len(), 10);
            assert!(classes.windows(2).all(|pair| pair[0] < pair[1]) && classes[9] < 20, "{classes:?}");
            classes.iter().for_each(|class| counts[*class as usize] += 1);
        }
        for (class, count) in counts.into_iter().enumerate() {
            let expected = if [0, 3, 7, 19].contains(&class) { 4000 } else { 4000 * 6 / 16 };
            assert!(f64::from(count - expected).abs() < 0.1 * f64::from(expected), "{class}: {count} of {expected}");
        }
        assert_eq!(sample_classes(&labels, 20, 0.1, &mut rng), [0, 3, 7, 19], "more labels than the share");
        assert_eq!(sample_classes(&[-1], 4, 1.0, &mut rng), [0, 1, 2, 3]);
        assert_eq!(sample_classes(&[-1], 4, 0.1, &mut rng).len(), 1, "fewer than one class in the share");
    }
}
