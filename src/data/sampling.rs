//! Order in which an epoch uses the images of a data set.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Returns `num_images` indices of images; all randomness comes from `rng`.
///
/// With `balance` 0 each image occurs once. Above 0, images are drawn with a weight of `n^-balance`, where `n` is the
/// number of images of the person: at 1 every person is equally likely. The images of a person take turns.
pub(super) fn order(
    num_images: usize,
    num_identities: usize,
    label: impl Fn(usize) -> u32,
    balance: f64,
    rng: &mut ChaCha8Rng,
) -> Vec<u32> {
    let mut images: Vec<u32> = (0..num_images as u32).collect();
    images.shuffle(rng);
    if balance == 0.0 {
        return images;
    }
    let mut of_people: Vec<Vec<u32>> = vec![Vec::new(); num_identities];
    images.iter().for_each(|&i| of_people[label(i as usize) as usize].push(i));
    // Cumulative weights of the people.
    let mut ends = Vec::with_capacity(num_identities);
    let mut sum = 0.0;
    for person in &of_people {
        // A person without images would otherwise weigh 0^0 = 1.
        sum += if person.is_empty() { 0.0 } else { (person.len() as f64).powf(1.0 - balance) };
        ends.push(sum);
    }
    let mut turns = vec![0usize; num_identities];
    let mut draw = || {
        let number = rng.random_range(0.0..sum);
        let person = ends.partition_point(|&end| end <= number).min(num_identities - 1);
        let (images, turn) = (&of_people[person], &mut turns[person]);
        *turn += 1;
        images[(*turn - 1) % images.len()]
    };
    (0..num_images).map(|_| draw()).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Person 0 has 900 images, 1 has 90, 2 has 10.
    fn labels() -> Vec<u32> {
        [0; 900].into_iter().chain([1; 90]).chain([2; 10]).collect()
    }

    fn counts(balance: f64) -> [usize; 3] {
        let labels = labels();
        let order = order(1000, 3, |i| labels[i], balance, &mut ChaCha8Rng::seed_from_u64(3));
        assert_eq!(order.len(), 1000);
        let mut counts = [0; 3];
        order.iter().for_each(|&i| counts[labels[i as usize] as usize] += 1);
        counts
    }

    #[test]
    fn people_come_as_often_as_the_balance_says() {
        assert_eq!(counts(0.0), [900, 90, 10]);
        let [first, second, third] = counts(1.0);
        assert!([first, second, third].iter().all(|c| (270..400).contains(c)), "{first} {second} {third}");
        // Square roots: 30, 9.5 and 3.2 of 42.6.
        let [first, second, third] = counts(0.5);
        assert!((650..760).contains(&first) && (170..270).contains(&second) && (45..110).contains(&third));
    }

    #[test]
    fn images_of_a_person_take_turns() {
        let labels = labels();
        let order = order(1000, 3, |i| labels[i], 1.0, &mut ChaCha8Rng::seed_from_u64(4));
        let mut of_third: Vec<u32> = order.into_iter().filter(|&i| i >= 990).take(10).collect();
        of_third.sort_unstable();
        assert_eq!(of_third, (990..1000).collect::<Vec<_>>());
    }
}
