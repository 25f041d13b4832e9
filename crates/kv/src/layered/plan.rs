//! Which token gets how many bits? One Lagrangian over all layers and heads under one budget of bytes.
//!
//! Reverse water-filling gives each head a family of profiles for keys and one for values: for falling water levels, each
//! group of channels the width that its variance is worth. A page then takes the pair that costs least: what its
//! tokens' errors weigh, plus lambda times its bytes. Tokens of like weights share pages, since attention asks for no order; a token
//! whose bits cost more than [`MARGIN`] times its loss is dropped from the head, unless it is guarded there: then its page's keys
//! have some bits, whatever they cost. Lambda follows by trial: the plan is a function of the statistics and the budget, and of nothing
//! else.

use super::importance::Weights;
use mosaickv_kernels::Pool;
use mosaickv_kernels::layered::{GROUP, PAGE_TOKENS, Pages, Profile, SKETCH, Width};

/// A token is dropped from a head if keeping it costs this many times what its loss would. RULER's UUIDs at a ratio of 8: 6 of
/// 100 found with 32, 24 with 4, 35 with 1.5 (`exact`: 53). But needles after 2,304 tokens: KL 0.020 with 4, 0.015 with 2.5, 0.114 with
/// 1.5.
const MARGIN: f32 = 2.5;

/// Water levels of a family, each half of the one before.
const LEVELS: i32 = 24;

/// Tokens of like importance that are ordered among each other by what their keys weigh against their values.
const RUN: usize = 12 * PAGE_TOKENS;

/// Share of the budget that may be left over.
const FILLED: f32 = 0.005;

/// Weights of pages of a family's first or last choice, from the least to the most.
const OPEN: f32 = 16.0;

/// Steps of the search at most; the bytes are then within a thousandth of the budget, or no lambda comes nearer.
const STEPS: usize = 24;

/// What is known of the channels of a head's keys or values.
#[derive(Clone, Debug)]
pub(crate) struct Channels {
    /// `[D]`: mean squares of what is left after subtracting means, in units of the errors that weights weigh.
    pub(crate) variances: Vec<f32>,
    /// Of each group of 8 channels and width, the share of elements that are escapes.
    pub(crate) escapes: Vec<[f32; 3]>,
}

/// A head to plan for.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) keys: Channels,
    pub(crate) values: Channels,
    /// Of each token, `[T]`; none is 0.
    pub(crate) weights: Weights,
    /// Tokens that must keep a key of their own, `[T]`.
    pub(crate) guarded: Vec<bool>,
}

/// What a head's tokens become.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct HeadPlan {
    /// The tokens that are kept, in the order of the pages.
    pub(crate) order: Vec<u32>,
    /// Profiles of keys and values of every 64 of them.
    pub(crate) pages: Vec<(Profile, Profile)>,
    /// Bytes expected.
    pub(crate) bytes: f32,
    /// The same if no token were guarded against having a key without bits.
    unguarded: f32,
}

impl HeadPlan {
    /// The pages by which a plan is tried out: the first four, whose tokens count most, and every eighth.
    pub(super) fn sample(&self) -> HeadPlan {
        let is_in = |page: usize| page < 4 || page.is_multiple_of(8);
        let chosen = || (0..self.pages.len()).filter(|&page| is_in(page));
        let tokens = |page: usize| self.order.chunks(PAGE_TOKENS).nth(page).into_iter().flatten();
        HeadPlan {
            order: chosen().flat_map(tokens).copied().collect(),
            pages: chosen().map(|page| self.pages[page]).collect(),
            ..HeadPlan::default()
        }
    }
}

/// The plan of all heads for about `budget` bytes of pages and escapes: never more if the one of the fewest bytes fits.
pub(crate) fn plan(pool: &Pool, heads: &[Head], budget: f32) -> Vec<HeadPlan> {
    let mut drafts: Vec<(Draft, HeadPlan)> =
        heads.iter().map(|_| (Draft::default(), HeadPlan::default())).collect();
    pool.for_each(&mut drafts, |i, (draft, _)| *draft = Draft::new(&heads[i]));
    let mut plan_at = |lambda: f32| {
        pool.for_each(&mut drafts, |i, (draft, plan)| *plan = draft.plan(&heads[i], lambda));
        let sum = |of: fn(&HeadPlan) -> f32| drafts.iter().map(|(_, plan)| of(plan)).sum::<f32>();
        (sum(|plan| plan.bytes), sum(|plan| plan.unguarded))
    };
    // Few budgets are so small that the guard takes anything, and only then it is searched with.
    let (mut below, mut above) = search(budget, |lambda| plan_at(lambda).1);
    let (mut bytes, unguarded) = plan_at(above);
    if bytes > unguarded {
        (below, above) = search(budget, |lambda| plan_at(lambda).0);
        (bytes, _) = plan_at(above);
    }
    let mut left = budget - bytes;
    if left > FILLED * budget {
        // Where many tokens weigh exactly alike, all of them go or stay at one lambda, and no plan at one lambda is near the budget.
        for ((draft, plan), head) in drafts.iter_mut().zip(heads) {
            let larger = draft.between(head, below, (plan, left));
            left -= larger.bytes - plan.bytes;
            *plan = larger;
        }
    }
    drafts.into_iter().map(|(_, plan)| plan).collect()
}

/// Calls `bytes_at` with different lambdas. Returns the highest found that takes more than `budget` bytes, and the lowest that
/// takes no more.
pub(super) fn search(budget: f32, mut bytes_at: impl FnMut(f32) -> f32) -> (f32, f32) {
    let budget = budget.max(1.0);
    // Logarithms of lambda, and of the bytes there over the budget: bytes fall as lambda rises.
    let (mut low, mut high) = ((1e-30f32.ln(), 9.0), (1e10f32.ln(), -9.0));
    for step in 0..STEPS {
        // Bytes go about like a power of lambda between; but where one end stays, halves get there.
        let share: f32 = if step < 3 || step % 3 == 2 { 0.5 } else { low.1 / (low.1 - high.1) };
        let middle = low.0 + share.clamp(0.02, 0.98) * (high.0 - low.0);
        let over = (bytes_at(middle.exp()) / budget).ln().clamp(-9.0, 9.0);
        if over > 0.0 {
            low = (middle, over);
            continue;
        }
        high = (middle, over);
        if over > 0.999f32.ln() {
            break;
        }
    }
    (low.0.exp(), high.0.exp())
}

fn mean_of(x: &[f32]) -> f32 {
    x.iter().sum::<f32>() / x.len() as f32
}

/// A way to store a page's keys or values.
#[derive(Clone, Copy, Debug, Default)]
struct Choice {
    profile: Profile,
    /// Of a page, escapes included.
    bytes: f32,
    /// Of a token of weight 1.
    loss: f32,
}

impl Choice {
    /// This one, or a page's profile if that has fewer bits.
    fn no_finer(&self, profile: Profile) -> Choice {
        if profile.bits() >= self.profile.bits() {
            return *self;
        }
        let bytes = (profile.bits() * PAGE_TOKENS) as f32 / 8.0;
        Choice { profile, bytes, loss: self.loss }
    }
}

/// Choices of rising bytes and falling loss, on their convex hull.
#[derive(Clone, Debug, Default)]
struct Family {
    choices: Vec<Choice>,
    /// The one of the fewest bytes that has bits, not on the hull perhaps; where all tokens are the same there is none, and it is the
    /// first.
    least: Choice,
    /// Weight of a page over lambda from which on the next choice is the better one.
    turns: Vec<f32>,
}

impl Family {
    fn of_keys(channels: &Channels) -> Family {
        // A score that is off by a normal error of variance x multiplies its weight by e^error: the mean square of
        // what that adds.
        Family::new(channels, SKETCH, |x| (2.0 * x).min(40.0).exp() - 2.0 * (0.5 * x).min(20.0).exp() + 1.0)
    }

    fn of_values(channels: &Channels) -> Family {
        Family::new(channels, 0, |x| x)
    }

    /// `loss_of` turns a variance of errors into what it costs; 2-bit groups come in pairs but for the first `apart`.
    fn new(channels: &Channels, apart: usize, loss_of: impl Fn(f32) -> f32) -> Family {
        let mut sums: Vec<f32> = channels.variances.chunks(GROUP).map(|group| group.iter().sum()).collect();
        let total: f32 = sums.iter().sum();
        let own = sums.clone();
        // Widths must not rise from group to group: a channel that this prompt uses more than calibration did lifts
        // those before it.
        for i in (1..sums.len()).rev() {
            sums[i - 1] = sums[i - 1].max(sums[i]);
        }
        let top = sums.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(*x)) / GROUP as f32;
        let mut choices = vec![Choice { loss: loss_of(total), ..Choice::default() }];
        for level in 0..2 * LEVELS {
            let water = 2.0 * top * (-0.5 * level as f32).exp2();
            let mut profile = Profile::default();
            for sum in &sums {
                let cost = |width: Width| sum / GROUP as f32 * width.loss() + water * width.bits() as f32;
                let best =
                    Width::ALL.into_iter().min_by(|a, b| cost(*a).total_cmp(&cost(*b))).expect("three");
                if cost(best) >= sum / GROUP as f32 {
                    break;
                }
                *match best {
                    Width::Two => &mut profile.two,
                    Width::Four => &mut profile.four,
                    Width::Eight => &mut profile.eight,
                } += 1;
            }
            for profile in profile.paired(sums.len(), apart) {
                let (mut error, mut escapes) = (total, 0.0);
                for ((width, own), escapes_of) in profile.widths().zip(&own).zip(&channels.escapes) {
                    error -= own * (1.0 - width.loss());
                    escapes += escapes_of[width as usize];
                }
                let bytes = (profile.bits() * PAGE_TOKENS) as f32 / 8.0
                    + escapes * (GROUP * PAGE_TOKENS * Pages::BYTES_OF_ESCAPE) as f32;
                choices.push(Choice { profile, bytes, loss: loss_of(error.max(0.0)) });
            }
        }
        Family::hull(choices)
    }

    fn hull(mut choices: Vec<Choice>) -> Family {
        choices.sort_by(|a, b| a.bytes.total_cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)));
        let least = choices.iter().find(|choice| choice.profile.groups() > 0).copied().unwrap_or(choices[0]);
        let turn = |a: &Choice, b: &Choice| (b.bytes - a.bytes) / (a.loss - b.loss);
        let mut hull: Vec<Choice> = Vec::new();
        for choice in choices {
            if hull.last().is_some_and(|last| choice.loss >= last.loss) {
                continue;
            }
            while let [.., a, b] = &hull[..] {
                if turn(b, &choice) > turn(a, b) {
                    break;
                }
                hull.pop();
            }
            hull.push(choice);
        }
        let turns = hull.windows(2).map(|pair| turn(&pair[0], &pair[1])).collect();
        Family { choices: hull, least, turns }
    }

    /// What pages of these profiles weigh over their plan's lambda: between the turns at which the profile begins and ceases to be
    /// the best, in the order in which they come.
    fn weights(&self, profiles: Vec<Profile>) -> Vec<f32> {
        let nearest = |profile: Profile| {
            let distance = |i: &usize| self.choices[*i].profile.bits().abs_diff(profile.bits());
            (0..self.choices.len()).min_by_key(distance).expect("a family has choices")
        };
        let chosen: Vec<usize> = profiles.into_iter().map(nearest).collect();
        let mut alike = vec![0; self.choices.len()];
        chosen.iter().for_each(|&i| alike[i] += 1);
        let mut seen = vec![0; self.choices.len()];
        let of_page = |i: usize| {
            seen[i] += 1;
            let share = (seen[i] as f32 - 0.5) / alike[i] as f32;
            let above = self.turns.get(i).copied();
            let below = i.checked_sub(1).map(|i| self.turns[i]);
            let (above, below) = match (above, below) {
                (Some(above), Some(below)) => (above, below),
                (Some(above), None) => (above, above / OPEN),
                (None, Some(below)) => (below * OPEN, below),
                (None, None) => (1.0, 1.0),
            };
            above.powf(1.0 - share) * below.powf(share)
        };
        chosen.into_iter().map(of_page).collect()
    }

    /// The choice that costs least for a page of this weight, over lambda.
    fn best(&self, weight_over_lambda: f32) -> &Choice {
        &self.choices[self.turns.partition_point(|turn| *turn < weight_over_lambda)]
    }
}

/// What does not depend on lambda.
#[derive(Clone, Debug, Default)]
struct Draft {
    keys: Family,
    values: Family,
    order: Vec<u32>,
}

impl Draft {
    fn new(head: &Head) -> Draft {
        let Weights { keys, values } = &head.weights;
        let logs = |weights: &[f32]| -> Vec<f32> { weights.iter().map(|w| w.ln()).collect() };
        let (key, value) = (logs(keys), logs(values));
        let sum = |t: u32| key[t as usize] + value[t as usize];
        let ratio = |t: u32| key[t as usize] - value[t as usize];
        let mut order: Vec<u32> = (0..keys.len() as u32).collect();
        order.sort_unstable_by(|&a, &b| sum(b).total_cmp(&sum(a)).then(a.cmp(&b)));
        for run in order.chunks_mut(RUN) {
            run.sort_unstable_by(|&a, &b| ratio(b).total_cmp(&ratio(a)).then(a.cmp(&b)));
        }
        Draft { keys: Family::of_keys(&head.keys), values: Family::of_values(&head.values), order }
    }

    fn plan(&self, head: &Head, lambda: f32) -> HeadPlan {
        let Weights { keys, values } = &head.weights;
        // The family's bytes are a page's.
        let per_token = lambda / PAGE_TOKENS as f32;
        // Neighbours in the order choose alike, and what is worth keeping with any choice is with the best.
        let mut last = (self.keys.best(0.0), self.values.best(0.0));
        let is_kept = |&&t: &&u32| {
            let (key, value) = (keys[t as usize], values[t as usize]);
            let is_worth_it = |(k, v): (&Choice, &Choice)| {
                key * k.loss + value * v.loss + per_token * (k.bytes + v.bytes) <= MARGIN * key
            };
            if head.guarded[t as usize] || is_worth_it(last) {
                return true;
            }
            last = (self.keys.best(key / per_token), self.values.best(value / per_token));
            is_worth_it(last)
        };
        self.paged(head, lambda, self.order.iter().filter(is_kept).copied().collect())
    }

    /// The plan at a `lambda` that takes too much, but with so many more tokens than the `smaller` plan has as `left` bytes are enough
    /// for; that plan if for none.
    fn between(&self, head: &Head, lambda: f32, (smaller, left): (&HeadPlan, f32)) -> HeadPlan {
        let larger = self.plan(head, lambda);
        let fits = |plan: &HeadPlan| plan.bytes - smaller.bytes <= left;
        if fits(&larger) {
            return larger;
        }
        let mut is_in = vec![false; self.order.len()];
        smaller.order.iter().for_each(|&t| is_in[t as usize] = true);
        let more: Vec<u32> = larger.order.iter().filter(|&&t| !is_in[t as usize]).copied().collect();
        let (mut low, mut high, mut best) = (0, more.len(), smaller.clone());
        while high - low > PAGE_TOKENS / 4 {
            let middle = low.midpoint(high);
            let mut is_in = is_in.clone();
            more[..middle].iter().for_each(|&t| is_in[t as usize] = true);
            let order = self.order.iter().filter(|&&t| is_in[t as usize]).copied().collect();
            let plan = self.paged(head, lambda, order);
            if fits(&plan) {
                (low, best) = (middle, plan);
            } else {
                high = middle;
            }
        }
        best
    }

    /// Pages of the tokens of `order`, at this lambda.
    fn paged(&self, head: &Head, lambda: f32, order: Vec<u32>) -> HeadPlan {
        let Weights { keys, values } = &head.weights;
        let sum = |weights: &[f32], page: &[u32]| page.iter().map(|&t| weights[t as usize]).sum::<f32>();
        let mut pages = Vec::with_capacity(order.len().div_ceil(PAGE_TOKENS));
        let (mut unguarded, mut more) = (0.0, 0.0);
        for page in order.chunks(PAGE_TOKENS) {
            let mut k = self.keys.best(sum(keys, page) / lambda);
            let v = self.values.best(sum(values, page) / lambda);
            unguarded += header() + k.bytes + v.bytes;
            // Keys without bits are the mean key, from which no token can be told.
            if k.profile.groups() == 0 && page.iter().any(|&t| head.guarded[t as usize]) {
                k = &self.keys.least;
                more += k.bytes;
            }
            pages.push((k.profile, v.profile));
        }
        HeadPlan { order, pages, bytes: unguarded + more, unguarded }
    }
}

/// What the pages of a head tell of the plan that they have, so that another can be made.
#[derive(Debug)]
pub(super) struct Again {
    keys: Family,
    values: Family,
    pages: Vec<Planned>,
}

/// A page as it was planned.
#[derive(Clone, Copy, Debug)]
struct Planned {
    keys: Profile,
    values: Profile,
    /// What its keys and its values weigh, over the lambda of its plan.
    weights: [f32; 2],
}

impl Again {
    /// Of the channels of keys and values, and runs of pages that were planned together, each in the plan's order.
    pub(super) fn new(
        (keys, values): (&Channels, &Channels),
        runs: impl IntoIterator<Item = Vec<(Profile, Profile)>>,
    ) -> Again {
        let (keys, values) = (Family::of_keys(keys), Family::of_values(values));
        let of_run = |run: Vec<(Profile, Profile)>| {
            let of_keys = keys.weights(run.iter().map(|(keys, _)| *keys).collect());
            let of_values = in_runs_reversed(
                values.weights(in_runs_reversed(run.iter().map(|(_, values)| *values).collect())),
            );
            let weights = of_keys.into_iter().zip(of_values);
            run.into_iter()
                .zip(weights)
                .map(|((keys, values), (k, v))| Planned { keys, values, weights: [k, v] })
                .collect::<Vec<_>>()
        };
        let pages = runs.into_iter().flat_map(of_run).collect();
        Again { keys, values, pages }
    }

    /// What each page gets at so many times its plan's lambda: never more bits than it has, and keys that have some keep some.
    fn at(&self, lambda: f32) -> impl Iterator<Item = (Choice, Choice)> {
        self.pages.iter().map(move |page| {
            let [key, value] = page.weights.map(|weight| weight / lambda);
            let mut keys = self.keys.best(key);
            if keys.profile.groups() == 0 && page.keys.groups() > 0 {
                keys = &self.keys.least;
            }
            (keys.no_finer(page.keys), self.values.best(value).no_finer(page.values))
        })
    }

    /// Bytes of the pages then, escapes aside.
    pub(super) fn bytes_at(&self, lambda: f32) -> f32 {
        self.at(lambda).map(|(keys, values)| header() + keys.bytes + values.bytes).sum()
    }

    /// Profiles of the pages then, in their order.
    pub(super) fn profiles_at(&self, lambda: f32) -> Vec<(Profile, Profile)> {
        self.at(lambda).map(|(keys, values)| (keys.profile, values.profile)).collect()
    }
}

/// Of what is ordered as a plan's pages, that of each [`RUN`] backwards: in a run values weigh more the less their keys do.
fn in_runs_reversed<T>(mut of_pages: Vec<T>) -> Vec<T> {
    of_pages.chunks_mut(RUN / PAGE_TOKENS).for_each(<[T]>::reverse);
    of_pages
}

/// The pair of profiles for a page of the head's mean tokens that takes at most `bytes`, header included.
pub(crate) fn fitting(head: &Head, bytes: f32) -> (Profile, Profile) {
    let (keys, values) = (Family::of_keys(&head.keys), Family::of_values(&head.values));
    let (key, value) = (mean_of(&head.weights.keys), mean_of(&head.weights.values));
    let mut found = (Profile::default(), Profile::default());
    let mut lambda = (key + value) * 1e6;
    for _ in 0..120 {
        let (k, v) = (keys.best(key / lambda), values.best(value / lambda));
        if header() + k.bytes + v.bytes > bytes {
            break;
        }
        found = (k.profile, v.profile);
        lambda *= 0.7;
    }
    found
}

/// Bytes of a page without codes.
fn header() -> f32 {
    Pages::bytes_of_page(Profile::default(), Profile::default()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(important: usize) -> Head {
        let tokens = 640;
        let channels = Channels {
            variances: (0..64).map(|c| 0.5 / (1.0 + c as f32)).collect(),
            escapes: vec![[0.002, 0.0, 0.0]; 8],
        };
        let weight = |t: usize| if t < important { 1.0 } else { 1e-7 };
        let weights: Vec<f32> = (0..tokens).map(weight).collect();
        Head {
            keys: channels.clone(),
            values: channels,
            weights: Weights { keys: weights.clone(), values: weights },
            guarded: (0..tokens).map(|t| t % 3 == 0).collect(),
        }
    }

    /// Nobody was asked for any token.
    #[test]
    fn tokens_that_weigh_alike_fill_the_budget() {
        let heads = vec![head(640); 40];
        let all: f32 = plan(&Pool::new(2), &heads, 1e9).iter().map(|plan| plan.bytes).sum();
        for share in [0.02, 0.05, 0.1, 0.2, 0.4, 0.8] {
            let plans = plan(&Pool::new(2), &heads, share * all);
            let bytes: f32 = plans.iter().map(|plan| plan.bytes).sum();
            assert!(bytes <= share * all && bytes > 0.97 * share * all, "{bytes} of {}", share * all);
        }
    }

    /// However few bytes there are, and whatever nobody asked for.
    #[test]
    fn a_guarded_token_keeps_a_key_of_its_own() {
        let heads = [head(128), head(0)];
        for budget in [1.0, 4000.0, 15_000.0] {
            for (plan, head) in plan(&Pool::new(2), &heads, budget).iter().zip(&heads) {
                let pages = plan.order.chunks(PAGE_TOKENS).zip(&plan.pages);
                let keyed = pages.filter(|(_, (keys, _))| keys.bits() > 0).flat_map(|(page, _)| page);
                let keyed = keyed.filter(|&&t| head.guarded[t as usize]).count();
                assert_eq!(keyed, head.guarded.iter().filter(|guarded| **guarded).count(), "{budget}");
            }
        }
    }

    #[test]
    fn the_budget_is_kept_and_bits_go_where_they_matter() {
        let heads = [head(128), head(320)];
        for budget in [15_000.0, 30_000.0, 60_000.0] {
            let plans = plan(&Pool::new(2), &heads, budget);
            let bytes: f32 = plans.iter().map(|plan| plan.bytes).sum();
            assert!(bytes <= budget && bytes > 0.9 * budget, "{bytes} of {budget}");
            assert!(plans[1].bytes > plans[0].bytes, "the head with more important tokens gets more");
            for (plan, head) in plans.iter().zip(&heads) {
                let mut kept = plan.order.clone();
                kept.sort_unstable();
                let all_different = kept.windows(2).all(|pair| pair[0] < pair[1]);
                assert!(all_different && plan.pages.len() == kept.len().div_ceil(PAGE_TOKENS));
                let is_kept = |t: u32| kept.binary_search(&t).is_ok();
                assert!(
                    (0..640).filter(|&t| head.guarded[t as usize]).all(is_kept),
                    "a guarded token is dropped"
                );
                let bits = |page: &(Profile, Profile)| page.0.bits() + page.1.bits();
                assert!(bits(&plan.pages[0]) > bits(plan.pages.last().unwrap()), "{:?}", plan.pages);
            }
        }
    }
}
