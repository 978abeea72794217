//! Instructions of the kernel's virtual machine (RFC 9669), written down by hand: what there is of them is little, and
//! no compiler for it can be asked of those who build this.

use std::collections::BTreeMap;

/// A register. What a function returns is in the first, what it is given in the next five; it leaves the four after
/// those as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reg(u8);

pub(super) const R0: Reg = Reg(0);
pub(super) const R1: Reg = Reg(1);
pub(super) const R2: Reg = Reg(2);
pub(super) const R3: Reg = Reg(3);
pub(super) const R4: Reg = Reg(4);
pub(super) const R5: Reg = Reg(5);
pub(super) const R6: Reg = Reg(6);
pub(super) const R7: Reg = Reg(7);
pub(super) const R8: Reg = Reg(8);
pub(super) const R9: Reg = Reg(9);
/// The end of the program's own memory, which lies below it.
pub(super) const FRAME: Reg = Reg(10);

/// How much is read or written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Width {
    Byte = 0x10,
    Half = 0x08,
    Word = 0x00,
    Double = 0x18,
}

/// When a jump is made.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    Equal = 0x10,
    Greater = 0x20,
    /// Any of the bits is set.
    AnyOf = 0x40,
    Different = 0x50,
}

/// Functions of the kernel's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Helper {
    MapLookup = 1,
    MapUpdate = 2,
    RedirectToNeighbour = 152,
    RedirectToPeer = 155,
    CoarseTime = 160,
}

/// What a word of 64 bits is taken for.
#[derive(Clone, Copy, Debug)]
enum Wide {
    Map = 1,
    MapValue = 2,
}

/// A program in the making. Places in it have names, which jumps may use before they are known.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    instructions: Vec<u64>,
    places: BTreeMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    fn emit(&mut self, code: u8, (to, from): (Reg, Reg), offset: i16, immediate: i32) {
        let registers = u64::from(to.0) | u64::from(from.0) << 4;
        let offset = u64::from(offset.cast_unsigned());
        let immediate = u64::from(immediate.cast_unsigned());
        self.instructions.push(u64::from(code) | registers << 8 | offset << 16 | immediate << 32);
    }

    /// Gives the next instruction a name.
    pub(super) fn place(&mut self, name: &'static str) {
        let before = self.places.insert(name, self.instructions.len());
        assert!(before.is_none(), "two places are called {name}");
    }

    pub(super) fn set(&mut self, to: Reg, value: i32) {
        self.emit(0xb7, (to, R0), 0, value);
    }

    pub(super) fn copy(&mut self, to: Reg, from: Reg) {
        self.emit(0xbf, (to, from), 0, 0);
    }

    pub(super) fn add(&mut self, to: Reg, value: i32) {
        self.emit(0x07, (to, R0), 0, value);
    }

    pub(super) fn subtract(&mut self, to: Reg, from: Reg) {
        self.emit(0x1f, (to, from), 0, 0);
    }

    pub(super) fn shift_right(&mut self, reg: Reg, bits: i32) {
        self.emit(0x77, (reg, R0), 0, bits);
    }

    /// Swaps the halves of a word; `other` is written over.
    pub(super) fn swap_halves(&mut self, word: Reg, other: Reg) {
        self.emit(0xbc, (other, word), 0, 0);
        self.emit(0x74, (other, R0), 0, 16);
        self.emit(0x64, (word, R0), 0, 16);
        self.emit(0x4c, (word, other), 0, 0);
    }

    pub(super) fn load(&mut self, width: Width, to: Reg, from: Reg, offset: i16) {
        self.emit(0x61 | width as u8, (to, from), offset, 0);
    }

    pub(super) fn store(&mut self, width: Width, to: Reg, offset: i16, from: Reg) {
        self.emit(0x63 | width as u8, (to, from), offset, 0);
    }

    pub(super) fn store_value(&mut self, width: Width, to: Reg, offset: i16, value: i32) {
        self.emit(0x62 | width as u8, (to, R0), offset, value);
    }

    pub(super) fn jump(&mut self, place: &'static str) {
        self.jumps.push((self.instructions.len(), place));
        self.emit(0x05, (R0, R0), 0, 0);
    }

    pub(super) fn jump_if(&mut self, reg: Reg, when: When, value: i32, place: &'static str) {
        self.jumps.push((self.instructions.len(), place));
        self.emit(0x05 | when as u8, (reg, R0), 0, value);
    }

    pub(super) fn jump_if_reg(&mut self, reg: Reg, when: When, other: Reg, place: &'static str) {
        self.jumps.push((self.instructions.len(), place));
        self.emit(0x0d | when as u8, (reg, other), 0, 0);
    }

    /// Takes a map for a function.
    pub(super) fn map(&mut self, to: Reg, map: i32) {
        self.wide(to, Wide::Map, map);
    }

    /// Takes where the first value of an array lies.
    pub(super) fn map_value(&mut self, to: Reg, map: i32) {
        self.wide(to, Wide::MapValue, map);
    }

    fn wide(&mut self, to: Reg, what: Wide, low: i32) {
        self.emit(0x18, (to, Reg(what as u8)), 0, low);
        self.emit(0x00, (R0, R0), 0, 0);
    }

    pub(super) fn call(&mut self, helper: Helper) {
        self.emit(0x85, (R0, R0), 0, helper as i32);
    }

    pub(super) fn exit(&mut self) {
        self.emit(0x95, (R0, R0), 0, 0);
    }

    /// The whole program, its jumps led to their places.
    pub(super) fn finish(mut self) -> Vec<u64> {
        for (at, name) in self.jumps {
            let place = self.places.get(name).unwrap_or_else(|| panic!("no place is called {name}"));
            let distance = i16::try_from(*place as isize - at as isize - 1).expect("programs are short");
            self.instructions[at] |= u64::from(distance.cast_unsigned()) << 16;
        }
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::{Assembler, R1, R2, When, Width};

    #[test]
    fn jumps_lead_to_their_places_in_both_directions() {
        let mut code = Assembler::default();
        code.place("start");
        code.jump_if(R1, When::Equal, 6, "end");
        code.load(Width::Half, R2, R1, -2);
        code.jump("start");
        code.place("end");
        code.exit();
        // Code, registers, distance and value of each, from the low bits on.
        let wanted = [0x0000_0006_0002_0115, 0x0000_0000_fffe_1269, 0x0000_0000_fffd_0005, 0x95];
        assert_eq!(wanted.as_slice(), code.finish());
    }
}
