//! Instruction sets: as a value, chosen at run time, and as types, for which kernels are compiled.

use std::sync::LazyLock;

/// An instruction set that kernels are compiled for.
///
/// Values other than `Portable` exist only where the CPU has the features: [`best_isa`] and [`available_isas`] are
/// the only ways to get one outside this crate, which is what makes safe functions of the kernels.
///
/// ```compile_fail
/// let isa = kvlathe_codec::Isa::Avx2; // nobody has looked whether the CPU has it
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// Whatever the build's target guarantees (SSE2 on x86-64, the compiler's use of NEON on aarch64).
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx2,
    /// AVX-512 F, BW, VL, DQ.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx512,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx512Vnni,
    /// NEON, in intrinsics.
    #[cfg(target_arch = "aarch64")]
    #[non_exhaustive]
    Neon,
}

impl Isa {
    /// Name as `KVLATHE_ISA` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
        }
    }
}

/// Every instruction set this machine can run, slowest first.
#[must_use]
pub fn available_isas() -> Vec<Isa> {
    #[allow(unused_mut, reason = "only x86-64 and aarch64 add to the list")]
    let mut isas = vec![Isa::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if avx2 {
            isas.push(Isa::Avx2);
        }
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        if avx2 && avx512 {
            isas.push(Isa::Avx512);
            if is_x86_feature_detected!("avx512vnni") {
                isas.push(Isa::Avx512Vnni);
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        isas.push(Isa::Neon);
    }
    isas
}

/// The instruction set in use: the fastest one, or the one that the environment variable `KVLATHE_ISA` names
/// (`portable`, `avx2`, `avx512`, `avx512vnni`, `neon`) if the machine has it. Read once.
#[must_use]
pub fn best_isa() -> Isa {
    static BEST: LazyLock<Isa> = LazyLock::new(|| {
        let isas = available_isas();
        let wanted = std::env::var("KVLATHE_ISA").ok();
        let forced = wanted.and_then(|name| isas.iter().copied().find(|isa| isa.name() == name));
        forced.unwrap_or(isas[isas.len() - 1])
    });
    *BEST
}

/// No more than the build's target guarantees; what the others are tested against.
pub(crate) struct Portable;

/// AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx2;

/// AVX-512 F, BW, VL, DQ.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512;

/// AVX-512 with VNNI, which multiplies and adds pairs of integers in one instruction.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512Vnni;

/// NEON, which every aarch64 has.
#[cfg(target_arch = "aarch64")]
pub(crate) struct Neon;
