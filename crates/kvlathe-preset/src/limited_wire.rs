//! Sequences of JSON that stop at the format's limits while they are parsed: `[{},{},…` costs 3 bytes an element on disk
//! and far more in memory.

use std::fmt;
use std::marker::PhantomData;

use kvlathe_codec::MAX_HEAD_DIM;
use serde::de::{self, DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// Largest free-form section, in bytes of JSON. Parsed JSON can take a hundred times the memory of its text.
pub(crate) const MAX_FREE_BYTES: usize = 1 << 20;

/// A free-form JSON object of at most [`MAX_FREE_BYTES`].
#[derive(Default, Serialize)]
pub(crate) struct Free(pub Map<String, Value>);

impl<'de> Deserialize<'de> for Free {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&RawValue>::deserialize(deserializer)?.get();
        if text.len() > MAX_FREE_BYTES {
            let given = text.len();
            return Err(de::Error::custom(format!(
                "a section of {given} bytes, at most {MAX_FREE_BYTES} are allowed"
            )));
        }
        serde_json::from_str(text)
            .map(Self)
            .map_err(|error| de::Error::custom(format!("a broken section: {error}")))
    }
}

/// A sequence of at most `N` elements.
pub(crate) struct Bounded<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize, const N: usize> Serialize for Bounded<T, N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Elements<T, N> {
            type Value = Vec<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} entries")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = seq.next_element()? {
                    if elements.len() == N {
                        return Err(de::Error::custom(format!("a list of more than {N} entries")));
                    }
                    elements.push(element);
                }
                Ok(elements)
            }
        }
        deserializer.deserialize_seq(Elements::<T, N>(PhantomData)).map(Self)
    }
}

/// A list of at most [`MAX_HEAD_DIM`] numbers. `null`, which Python writes for nothing but people do, becomes
/// NaN, so that validation can say where it stands.
pub(crate) struct Numbers(pub Vec<f32>);

impl Serialize for Numbers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut numbers = Vec::new();
        Row { numbers: &mut numbers }.deserialize(deserializer)?;
        Ok(Self(numbers))
    }
}

/// Appends a list of numbers to `numbers` and returns how many there were.
struct Row<'a> {
    numbers: &'a mut Vec<f32>,
}

impl<'de> DeserializeSeed<'de> for Row<'_> {
    type Value = usize;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = usize;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX_HEAD_DIM} numbers")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<usize, A::Error> {
        let mut n = 0;
        while let Some(number) = seq.next_element::<Option<f32>>()? {
            if n == MAX_HEAD_DIM {
                return Err(de::Error::custom(format!("a list of more than {MAX_HEAD_DIM} numbers")));
            }
            self.numbers.push(number.unwrap_or(f32::NAN));
            n += 1;
        }
        Ok(n)
    }
}

/// A list of rows, kept row-major.
pub(crate) struct Matrix {
    pub data: Vec<f32>,
    pub n_rows: usize,
    /// Length of the first row.
    pub n_cols: usize,
    /// The first row that is not as long as row 0, and its length.
    pub ragged: Option<(usize, usize)>,
}

impl Matrix {
    /// `data` has a multiple of `n_cols` numbers.
    pub fn new(data: Vec<f32>, n_cols: usize) -> Self {
        Self { n_rows: data.len() / n_cols.max(1), data, n_cols, ragged: None }
    }
}

impl Serialize for Matrix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rows = serializer.serialize_seq(Some(self.n_rows))?;
        for row in self.data.chunks_exact(self.n_cols.max(1)) {
            rows.serialize_element(row)?;
        }
        rows.end()
    }
}

impl<'de> Deserialize<'de> for Matrix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Rows;
        impl<'de> Visitor<'de> for Rows {
            type Value = Matrix;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_HEAD_DIM} rows of numbers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Matrix, A::Error> {
                let mut matrix = Matrix { data: Vec::new(), n_rows: 0, n_cols: 0, ragged: None };
                while let Some(len) = seq.next_element_seed(Row { numbers: &mut matrix.data })? {
                    if matrix.n_rows == MAX_HEAD_DIM {
                        return Err(de::Error::custom(format!("a list of more than {MAX_HEAD_DIM} rows")));
                    }
                    if matrix.n_rows == 0 {
                        matrix.n_cols = len;
                    } else if len != matrix.n_cols && matrix.ragged.is_none() {
                        matrix.ragged = Some((matrix.n_rows, len));
                    }
                    matrix.n_rows += 1;
                }
                Ok(matrix)
            }
        }
        deserializer.deserialize_seq(Rows)
    }
}
