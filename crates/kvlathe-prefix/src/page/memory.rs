//! Where the numbers of a page lie in a server's memory.

use kvlathe_cache::CacheError;
use kvlathe_codec::Element;

use super::Result;

/// Sizes of a page as a server holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSizes {
    /// Layers.
    pub n_layers: usize,
    /// Workers that share the KV heads of each layer.
    pub n_workers: usize,
    /// KV heads of one worker.
    pub n_heads: usize,
    /// The server's blocks in a page.
    pub n_blocks: usize,
    /// Tokens of the server's block.
    pub block_tokens: usize,
    /// Components of keys and of values.
    pub head_dim: usize,
}

impl PageSizes {
    /// Tokens of a page.
    #[must_use]
    pub const fn n_tokens(&self) -> usize {
        self.n_blocks * self.block_tokens
    }

    /// Numbers of a page, keys and values.
    fn n_numbers(&self) -> Option<usize> {
        let Self { n_layers, n_workers, n_heads, n_blocks, block_tokens, head_dim } = *self;
        let sizes = [n_layers, n_workers, n_heads, n_blocks, block_tokens, head_dim];
        sizes.into_iter().try_fold(2, usize::checked_mul)
    }
}

/// How a server lays its pages out: steps from layer to layer, worker to worker, head to head and block to block, and the
/// places of a head's keys and values within its block, in whatever order a kernel likes them.
#[derive(Debug, Clone)]
pub struct PageMemory {
    sizes: PageSizes,
    strides: [usize; 4],
    places: Vec<usize>,
    n_numbers: usize,
}

impl PageMemory {
    /// `strides` are those of layers, workers, heads and blocks; `places` are `[2, block_tokens, head_dim]`, keys before
    /// values; all in numbers.
    ///
    /// # Errors
    /// Sizes of nothing, other than so many places, and places that overlap or reach beyond a page's numbers.
    pub fn new(sizes: PageSizes, strides: [usize; 4], places: Vec<usize>) -> Result<Self> {
        let shape = |what, given, expected| Err(CacheError::Shape { what, given, expected }.into());
        let Some(n_numbers) = sizes.n_numbers().filter(|&n| n > 0 && n < 1 << 31) else {
            return shape("numbers of a page", sizes.n_numbers().unwrap_or(usize::MAX), 1 << 31);
        };
        let expected = 2 * sizes.block_tokens * sizes.head_dim;
        if places.len() != expected {
            return shape("places of a block's numbers", places.len(), expected);
        }
        let this = Self { sizes, strides, places, n_numbers };
        let mut taken = vec![false; n_numbers];
        for run in this.runs() {
            for place in this.places.iter().map(|place| run.checked_add(*place)) {
                match place.and_then(|place| taken.get_mut(place)) {
                    Some(taken) if !*taken => *taken = true,
                    _ => return shape("a place within the page", place.unwrap_or(usize::MAX), n_numbers - 1),
                }
            }
        }
        Ok(this)
    }

    /// Sizes of a page.
    #[must_use]
    pub const fn sizes(&self) -> PageSizes {
        self.sizes
    }

    /// Numbers of a page, keys and values: it lies in so many from its first one on.
    #[must_use]
    pub const fn n_numbers(&self) -> usize {
        self.n_numbers
    }

    /// Where the numbers of each layer, worker, head and block begin, in this order.
    fn runs(&self) -> impl Iterator<Item = usize> + '_ {
        let PageSizes { n_layers, n_workers, n_heads, n_blocks, .. } = self.sizes;
        let [of_layers, of_workers, of_heads, of_blocks] = self.strides;
        let step = |at: usize, stride: usize| at.saturating_mul(stride);
        (0..n_layers).flat_map(move |layer| {
            (0..n_workers).flat_map(move |worker| {
                (0..n_heads).flat_map(move |head| {
                    (0..n_blocks).map(move |block| {
                        let steps = [step(layer, of_layers), step(worker, of_workers), step(head, of_heads)];
                        steps.into_iter().fold(step(block, of_blocks), usize::saturating_add)
                    })
                })
            })
        })
    }

    /// Keys and values, `[layers, heads, n_tokens, head_dim]` each, of a page that lies at the beginning of `memory`.
    ///
    /// # Errors
    /// Less memory than a page takes.
    pub fn gather<E: Element>(&self, memory: &[E]) -> Result<[Vec<E>; 2]> {
        self.check(memory.len())?;
        let half = self.n_numbers / 2;
        let mut page = [Vec::with_capacity(half), Vec::with_capacity(half)];
        for run in self.runs() {
            let (of_keys, of_values) = self.places.split_at(self.places.len() / 2);
            for (out, places) in page.iter_mut().zip([of_keys, of_values]) {
                out.extend(places.iter().map(|place| memory[run + place]));
            }
        }
        Ok(page)
    }

    /// Writes keys and values, as [`PageMemory::gather`] gives them, to the beginning of `memory`.
    ///
    /// # Errors
    /// Less memory than a page takes, and other than its numbers.
    pub fn scatter<E: Element>(&self, page: [&[E]; 2], memory: &mut [E]) -> Result<()> {
        self.check(memory.len())?;
        let (half, per_run) = (self.n_numbers / 2, self.places.len() / 2);
        for of_side in page {
            if of_side.len() != half {
                return Err(CacheError::Buffer { what: "page", given: of_side.len(), expected: half }.into());
            }
        }
        for (at, run) in self.runs().enumerate() {
            for (of_side, places) in page.iter().zip(self.places.chunks_exact(per_run)) {
                for (number, place) in of_side[at * per_run..].iter().zip(places) {
                    memory[run + place] = *number;
                }
            }
        }
        Ok(())
    }

    fn check(&self, given: usize) -> Result<()> {
        let expected = self.n_numbers;
        if given < expected {
            return Err(CacheError::Buffer { what: "memory of a page", given, expected }.into());
        }
        Ok(())
    }
}
