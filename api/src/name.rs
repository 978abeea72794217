//! The names users give to objects.

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a {kind} needs a name")]
    Missing { kind: &'static str },
    #[error("{name:?} is no name for a {kind}: at most {len_max} characters are allowed, it has {len}")]
    TooLong { kind: &'static str, name: String, len: usize, len_max: usize },
    #[error("{name:?} is no name for a {kind}: {rule}")]
    Characters { kind: &'static str, name: String, rule: &'static str },
}

const SERVICE_NAME_CHARS_MAX: usize = 63;
const OBJECT_NAME_CHARS_MAX: usize = 64;

/// Names of services follow DNS labels, with `_` allowed inside:
/// `[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*`, up to 63 characters.
pub fn check_service_name(name: &str) -> Result<(), NameError> {
    check(
        "service",
        name,
        SERVICE_NAME_CHARS_MAX,
        "letters, digits, - and _ are allowed, with a letter or digit at both ends",
        |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'),
    )
}

/// Names of networks: `[a-zA-Z0-9-_.]`, up to 63 characters, a letter or digit at both ends.
pub fn check_network_name(name: &str) -> Result<(), NameError> {
    check(
        "network",
        name,
        SERVICE_NAME_CHARS_MAX,
        "letters, digits, -, _ and . are allowed, with a letter or digit at both ends",
        |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'),
    )
}

/// Names of secrets, configs, volumes and their drivers: `[a-zA-Z0-9-_.]`, up to 64 characters, a letter or digit at both ends.
pub fn check_object_name(kind: &'static str, name: &str) -> Result<(), NameError> {
    check(
        kind,
        name,
        OBJECT_NAME_CHARS_MAX,
        "letters, digits, -, _ and . are allowed, with a letter or digit at both ends",
        |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'),
    )
}

fn check(
    kind: &'static str,
    name: &str,
    len_max: usize,
    rule: &'static str,
    allowed: impl Fn(u8) -> bool,
) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Missing { kind });
    }
    if name.len() > len_max {
        return Err(NameError::TooLong { kind, name: name.to_owned(), len: name.len(), len_max });
    }
    let bytes = name.as_bytes();
    let ends = [bytes[0], bytes[bytes.len() - 1]];
    if ends.iter().all(u8::is_ascii_alphanumeric) && bytes.iter().all(|&b| allowed(b)) {
        Ok(())
    } else {
        Err(NameError::Characters { kind, name: name.to_owned(), rule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names_are_dns_labels() {
        for good in ["web", "a", "my_app-1", "A9"] {
            assert_eq!(check_service_name(good), Ok(()), "{good}");
        }
        let long = "x".repeat(64);
        for bad in ["", "-web", "web-", "a.b", "ü", "a b", &long] {
            assert!(check_service_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_may_have_dots() {
        assert_eq!(check_object_name("secret", "db.pass_1"), Ok(()));
        assert!(check_object_name("secret", ".hidden").is_err());
    }
}
