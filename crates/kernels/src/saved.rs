//! What pages are when they are written down, and how bytes of unknown origin are read back.
//!
//! Numbers are little-endian, as in memory on the machines that this is built for. What is read was not necessarily written here: lengths are
//! looked at before anything is allocated, and whoever reads checks every number that a kernel relies on.

use bytemuck::{AnyBitPattern, NoUninit};
use std::io::{self, Write};

#[cfg(target_endian = "big")]
compile_error!("saved caches are little-endian");

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Malformed {
    /// In words, unless what is asked for holds.
    pub fn unless(holds: bool, why: impl FnOnce() -> String) -> Result<(), Malformed> {
        if holds { Ok(()) } else { Err(Malformed(why())) }
    }
}

/// Bytes from front to back.
#[derive(Debug)]
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input { rest: bytes }
    }

    /// Bytes that have not been read.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next number.
    pub fn number<T: AnyBitPattern>(&mut self) -> Result<T, Malformed> {
        Ok(bytemuck::pod_read_unaligned(self.take(size_of::<T>())?))
    }

    /// A count, which was written with 8 bytes.
    pub fn count(&mut self) -> Result<usize, Malformed> {
        let count: u64 = self.number()?;
        usize::try_from(count).map_err(|_| Malformed(format!("a count of {count}")))
    }

    /// The next `count` numbers.
    pub fn numbers<T: AnyBitPattern + NoUninit>(&mut self, count: usize) -> Result<Vec<T>, Malformed> {
        let bytes = count.checked_mul(size_of::<T>());
        let bytes = self.take(bytes.ok_or_else(|| Malformed(format!("{count} numbers")))?)?;
        let mut numbers = vec![T::zeroed(); count];
        bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(bytes);
        Ok(numbers)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| {
            Malformed(format!("{} bytes are left where {count} more should be", self.rest.len()))
        })?;
        self.rest = rest;
        Ok(taken)
    }
}

/// Writes numbers, for [`Input::numbers`].
pub fn write_numbers<T: NoUninit>(out: &mut impl Write, numbers: &[T]) -> io::Result<()> {
    out.write_all(bytemuck::cast_slice(numbers))
}

/// Writes a count, for [`Input::count`].
pub fn write_count(out: &mut impl Write, count: usize) -> io::Result<()> {
    out.write_all(&(count as u64).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = vec![];
        write_count(&mut bytes, 3).unwrap();
        write_numbers(&mut bytes, &[1.5f32, -2.0, 3.25]).unwrap();
        write_numbers(&mut bytes, &[7u8]).unwrap();
        let mut input = Input::new(&bytes);
        let count = input.count().unwrap();
        assert_eq!(input.numbers::<f32>(count).unwrap(), [1.5, -2.0, 3.25]);
        assert_eq!((input.number::<u8>().unwrap(), input.left()), (7, 0));
        assert!(input.number::<u8>().is_err());
    }

    #[test]
    fn nothing_is_allocated_for_numbers_that_are_not_there() {
        let bytes = u64::MAX.to_le_bytes();
        let mut input = Input::new(&bytes);
        let count = input.count().unwrap();
        let error = input.numbers::<f32>(count).unwrap_err();
        assert!(error.0.contains("numbers"), "{error}");
        let error = input.numbers::<u64>(1 << 40).unwrap_err();
        assert_eq!(error.0, "0 bytes are left where 8796093022208 more should be");
    }
}
