//! Modes as `--chmod` takes them: octal, or in the words of chmod.

use std::str::FromStr;

/// A mode, or a change of the one that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chmod {
    Octal(u32),
    Symbolic(Vec<Clause>),
}

/// One change, such as `go-w`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Clause {
    /// The bits of those whom it is about.
    whose: u32,
    change: Change,
    permissions: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Add,
    Remove,
    Set,
}

impl FromStr for Chmod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(mode) = u32::from_str_radix(text, 8) {
            return if mode <= 0o7777 { Ok(Self::Octal(mode)) } else { Err(refusal(text)) };
        }
        let clauses = text.split(',').map(clauses).collect::<Option<Vec<_>>>();
        clauses.map(|clauses| Self::Symbolic(clauses.concat())).ok_or_else(|| refusal(text))
    }
}

fn refusal(text: &str) -> String {
    format!("--chmod={text} is no mode: write an octal number, such as 755, or a change, such as u=rwX,go=rX")
}

/// All changes for the same ones: `u+x-w` has two.
fn clauses(text: &str) -> Option<Vec<Clause>> {
    let (who, mut rest) = text.split_at(text.find(['+', '-', '='])?);
    let bits = |who| match who {
        'u' => Some(0o4700),
        'g' => Some(0o2070),
        'o' => Some(0o1007),
        'a' => Some(0o7777),
        _ => None,
    };
    let whose = match who {
        "" => 0o7777,
        who => who.chars().map(bits).try_fold(0, |all, bits| Some(all | bits?))?,
    };
    let mut clauses = Vec::new();
    while let Some(sign) = rest.chars().next() {
        let change = match sign {
            '+' => Change::Add,
            '-' => Change::Remove,
            _ => Change::Set,
        };
        let end = rest[1..].find(['+', '-', '=']).map_or(rest.len(), |end| end + 1);
        let permissions = rest[1..end].to_owned();
        if !permissions.chars().all(|letter| "rwxXst".contains(letter)) {
            return None;
        }
        clauses.push(Clause { whose, change, permissions });
        rest = &rest[end..];
    }
    Some(clauses)
}

impl Chmod {
    /// The mode of what has `mode` now.
    pub(crate) fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        match self {
            Self::Octal(mode) => *mode,
            Self::Symbolic(clauses) => clauses.iter().fold(mode, |mode, clause| clause.apply(mode, is_dir)),
        }
    }
}

impl Clause {
    fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        let bits = |letter| match letter {
            'r' => 0o444,
            'w' => 0o222,
            // Of files only if somebody may execute them.
            'X' if is_dir || mode & 0o111 != 0 => 0o111,
            'x' => 0o111,
            's' => 0o6000,
            't' => 0o1000,
            _ => 0,
        };
        let named = self.permissions.chars().map(bits).fold(0, |all, bits| all | bits) & self.whose;
        match self.change {
            Change::Add => mode | named,
            Change::Remove => mode & !named,
            Change::Set => (mode & !(self.whose & 0o777)) | named,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_and_applied_as_chmod_does() {
        for (text, before, is_dir, want) in [
            ("755", 0o600, false, 0o755),
            ("4755", 0o600, false, 0o4755),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o700, true, 0o755),
            ("+x", 0o644, false, 0o755),
            ("a-w", 0o666, false, 0o444),
            ("go=", 0o777, false, 0o700),
            ("u+x-w", 0o600, false, 0o500),
            ("u+s,+t", 0o755, true, 0o5755),
        ] {
            let got = text.parse::<Chmod>().unwrap().apply(before, is_dir);
            assert_eq!(got, want, "{text} of {before:o} is {got:o}");
        }
        for text in ["", "77777", "rwx", "u=rwz", "q+x", "8"] {
            assert!(text.parse::<Chmod>().unwrap_err().contains("no mode"), "{text}");
        }
    }
}
