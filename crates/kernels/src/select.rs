//! Which token blocks does a step attend to?
//!
//! The k best of a list of scores. It knows no format: a score is a number, a block is its index.

/// The `k` indices of highest score (all of them if there are fewer), ascending. Ties go to the lower index, so
/// the choice depends on the scores alone. Scores are ordered by `f32::total_cmp`: `+NaN` counts as the
/// highest.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    assert!(u32::try_from(scores.len()).is_ok(), "{} scores: indices are 32-bit", scores.len());
    let k = k.min(scores.len());
    if k == 0 {
        return Vec::new();
    }
    // A smaller rank is better; ranks are distinct because the index is a part of them. The k-th best rank
    // then splits the list, and one more walk over the scores finds the winners in order.
    let mut ranks: Vec<u64> = scores.iter().enumerate().map(|(i, &s)| rank(s, i)).collect();
    let last = *ranks.select_nth_unstable(k - 1).1;
    let mut out = Vec::with_capacity(k);
    out.extend(scores.iter().enumerate().filter(|&(i, &s)| rank(s, i) <= last).map(|(i, _)| i as u32));
    out
}

/// Orders by falling score, then by rising index.
#[inline(always)]
fn rank(score: f32, index: usize) -> u64 {
    let bits = score.to_bits();
    // Rising order of floats as unsigned integers: flip all of a negative number, the sign of the others.
    let rising = bits ^ (((bits as i32 >> 31) as u32) | 1 << 31);
    u64::from(!rising) << 32 | index as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The slow way: sort everything.
    fn sorted(scores: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(top_k(&[1.0, 2.0, 1.0, 2.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(top_k(&[0.0, -0.0, 0.0], 2), [0, 2]);
        assert_eq!(top_k(&[f32::NEG_INFINITY; 3], 2), [0, 1]);
    }

    #[test]
    fn more_than_there_are_and_none() {
        assert_eq!(top_k(&[3.0, 1.0], 9), [0, 1]);
        assert!(top_k(&[], 4).is_empty() && top_k(&[1.0], 0).is_empty());
    }

    proptest! {
        #[test]
        fn same_as_sorting(scores in prop::collection::vec(prop_oneof![
            3 => -4i8..4, 1 => any::<i8>()], 0..300), k in 0usize..320) {
            let scores: Vec<f32> = scores.iter().map(|&s| f32::from(s) / 3.0).collect();
            prop_assert_eq!(top_k(&scores, k), sorted(&scores, k));
        }

        #[test]
        fn any_float_is_ordered(scores in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..50),
                                k in 0usize..50) {
            prop_assert_eq!(top_k(&scores, k), sorted(&scores, k));
        }
    }
}
