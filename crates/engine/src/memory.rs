//! How many bytes may all caches take together, and who has them?

/// A budget of bytes and what is reserved of it.
#[derive(Debug)]
pub struct Memory {
    budget: usize,
    reserved: usize,
}

/// Bytes that somebody may use; they go back by [`Memory::release`].
#[derive(Debug)]
#[must_use = "bytes that nobody releases are lost"]
pub struct Reservation(usize);

impl Memory {
    /// All of `budget` is free.
    pub fn new(budget: usize) -> Memory {
        Memory { budget, reserved: 0 }
    }

    /// What there is.
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// What is not reserved.
    pub fn free(&self) -> usize {
        self.budget - self.reserved
    }

    /// What is reserved.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// `bytes`, if so many are free.
    pub fn reserve(&mut self, bytes: usize) -> Option<Reservation> {
        if bytes > self.free() {
            return None;
        }
        self.reserved += bytes;
        Some(Reservation(bytes))
    }

    /// Makes a reservation larger or smaller; `false`, and nothing changes, if so many are not free.
    #[must_use]
    pub fn resize(&mut self, reservation: &mut Reservation, bytes: usize) -> bool {
        let others = self.reserved - reservation.0;
        if bytes > self.budget - others {
            return false;
        }
        self.reserved = others + bytes;
        reservation.0 = bytes;
        true
    }

    /// `bytes` of a reservation, as one of their own; `None`, and nothing changes, if it has fewer.
    pub fn split(&mut self, reservation: &mut Reservation, bytes: usize) -> Option<Reservation> {
        reservation.0 = reservation.0.checked_sub(bytes)?;
        Some(Reservation(bytes))
    }

    /// Two reservations as one.
    pub fn join(&mut self, reservation: &mut Reservation, other: Reservation) {
        reservation.0 += other.0;
    }

    /// Gives bytes back.
    pub fn release(&mut self, reservation: Reservation) {
        self.reserved -= reservation.0;
    }
}
