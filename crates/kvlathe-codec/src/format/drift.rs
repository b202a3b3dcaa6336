//! Drift: what the tokens of a block have in common beside the mean, four bits a coefficient.

/// One level of drift, in standard deviations of a coefficient; levels go from −8 to 7.
pub const DRIFT_STEP: f32 = 0.1875;
/// Levels below none.
pub(crate) const DRIFT_HALF: usize = 8;
/// What a token may add to its block's drift, in standard deviations: an outlier must not move the others.
pub(crate) const DRIFT_REACH: f32 = 4.0;

/// Code of the drift of a coefficient whose values, in steps and clamped to [`DRIFT_REACH`], sum to `sum` over the
/// `n_tokens` of a block that are not zero; `unit` is one level in steps.
#[inline(always)]
pub(crate) fn quantise_drift(sum: f32, unit: f32, n_tokens: usize) -> u8 {
    let level = (sum * (1.0 / (unit * n_tokens as f32)) + 0.5).floor();
    let half = DRIFT_HALF as f32;
    (level.max(-half).min(half - 1.0) + half) as i32 as u8
}

/// Tokens whose drift is a block's, of all gain codes: zero vectors have none. At least one, to divide by.
#[inline(always)]
pub(crate) fn n_drifting(gain_codes: &[u16]) -> usize {
    gain_codes.iter().map(|&code| usize::from(code != 0)).sum::<usize>().max(1)
}

/// The drift that a code stands for, in steps.
#[inline(always)]
pub(crate) fn drift(code: u8, unit: f32) -> f32 {
    (f32::from(code) - DRIFT_HALF as f32) * unit
}

/// Packs the drift codes `[head_dim]`, below 16: byte j holds those of the coefficients j and j + ⌈head_dim/2⌉.
#[inline(always)]
pub(crate) fn pack_drift(codes: &[u8], packed: &mut [u8]) {
    let (low, high) = codes.split_at(packed.len());
    packed.copy_from_slice(low);
    for j in 0..high.len() {
        packed[j] |= high[j] << 4;
    }
}

/// The drift code of one coefficient.
#[inline(always)]
pub(crate) fn drift_code(packed: &[u8], coefficient: usize) -> u8 {
    let n = packed.len();
    if coefficient < n { packed[coefficient] & 15 } else { packed[coefficient - n] >> 4 }
}
