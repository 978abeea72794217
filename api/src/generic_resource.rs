//! Things of a node that its user counts or names, such as graphics cards, and what tasks reserve of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

/// The most of one kind that a node may have, or a task reserve.
const COUNT_MAX: i64 = 1_000_000;

/// One thing by its name, or so many of a kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Extensible, Serialize, Deserialize)]
pub enum GenericResource {
    #[serde(rename = "NamedResourceSpec", rename_all = "PascalCase")]
    Named { kind: String, value: String },
    #[serde(rename = "DiscreteResourceSpec", rename_all = "PascalCase")]
    Discrete { kind: String, value: i64 },
}

/// Why resources are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GenericResourceError {
    #[error("generic resource {0:?} cannot be read: write KIND=NUMBER, or KIND=NAME for one of its own")]
    Unreadable(String),
    #[error("there cannot be {count} of generic resource {kind}: from 1 to {COUNT_MAX} are possible")]
    Count { kind: String, count: i64 },
    #[error("generic resource {0} is named and counted: a node's are one or the other")]
    Both(String),
    #[error("generic resource {0} is there twice")]
    Twice(String),
    #[error("generic resource {kind}={value} names one of a node's: reserve a number, such as {kind}=1")]
    Reserved { kind: String, value: String },
}

impl GenericResource {
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Named { kind, .. } | Self::Discrete { kind, .. } => kind,
        }
    }

    /// How many of its kind it is.
    #[must_use]
    pub const fn count(&self) -> i64 {
        match self {
            Self::Named { .. } => 1,
            Self::Discrete { value, .. } => *value,
        }
    }
}

impl fmt::Display for GenericResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named { kind, value } => write!(f, "{kind}={value}"),
            Self::Discrete { kind, value } => write!(f, "{kind}={value}"),
        }
    }
}

impl FromStr for GenericResource {
    type Err = GenericResourceError;

    /// Reads `KIND=NUMBER` or `KIND=NAME`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || GenericResourceError::Unreadable(text.to_owned());
        let is_name = |text: &str| !text.is_empty() && !text.contains([',', '=', ' ']);
        let (kind, value) =
            text.split_once('=').filter(|(kind, value)| is_name(kind) && is_name(value)).ok_or_else(wrong)?;
        let kind = kind.to_owned();
        match value.parse() {
            Ok(value) => Ok(Self::Discrete { kind, value }),
            Err(_) => Ok(Self::Named { kind, value: value.to_owned() }),
        }
    }
}

/// Checks what a node has.
pub fn check_of_node(resources: &[GenericResource]) -> Result<(), GenericResourceError> {
    let mut seen = BTreeMap::<&str, bool>::new();
    let mut all = BTreeSet::new();
    for resource in resources {
        let is_named = matches!(resource, GenericResource::Named { .. });
        let kind = resource.kind();
        check_count(resource)?;
        match seen.insert(kind, is_named) {
            Some(before) if before != is_named => return Err(GenericResourceError::Both(kind.to_owned())),
            Some(false) => return Err(GenericResourceError::Twice(kind.to_owned())),
            Some(true) | None => {}
        }
        if !all.insert(resource) {
            return Err(GenericResourceError::Twice(resource.to_string()));
        }
    }
    Ok(())
}

/// Checks what a task asks for: a number of each kind.
pub fn check_reserved(resources: &[GenericResource]) -> Result<(), GenericResourceError> {
    let mut seen = BTreeSet::new();
    for resource in resources {
        if let GenericResource::Named { kind, value } = resource {
            return Err(GenericResourceError::Reserved { kind: kind.clone(), value: value.clone() });
        }
        check_count(resource)?;
        if !seen.insert(resource.kind()) {
            return Err(GenericResourceError::Twice(resource.kind().to_owned()));
        }
    }
    Ok(())
}

fn check_count(resource: &GenericResource) -> Result<(), GenericResourceError> {
    let count = resource.count();
    if (1..=COUNT_MAX).contains(&count) {
        return Ok(());
    }
    Err(GenericResourceError::Count { kind: resource.kind().to_owned(), count })
}

/// How many of a kind there are.
#[must_use]
pub fn count_of(resources: &[GenericResource], kind: &str) -> i64 {
    resources.iter().filter(|resource| resource.kind() == kind).map(GenericResource::count).sum()
}

/// What a task gets of a node's for what it reserves: of those with names, the first that nobody has.
#[must_use]
pub fn assign<'a>(
    of_node: &[GenericResource],
    taken: impl Iterator<Item = &'a GenericResource>,
    reserved: &[GenericResource],
) -> Vec<GenericResource> {
    let taken: BTreeSet<_> = taken.collect();
    let mut assigned = Vec::new();
    for wanted in reserved {
        let of_kind = of_node.iter().filter(|has| has.kind() == wanted.kind());
        let mut named = of_kind.filter(|has| matches!(has, GenericResource::Named { .. })).peekable();
        if named.peek().is_none() {
            assigned.push(wanted.clone());
            continue;
        }
        let count = usize::try_from(wanted.count()).unwrap_or(0);
        assigned.extend(named.filter(|has| !taken.contains(has)).take(count).cloned());
    }
    assigned
}

/// What tells a task of its resources: a variable for each kind.
#[must_use]
pub fn variables(assigned: &[GenericResource]) -> Vec<String> {
    let mut values: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for resource in assigned {
        let value = match resource {
            GenericResource::Named { value, .. } => value.clone(),
            GenericResource::Discrete { value, .. } => value.to_string(),
        };
        values.entry(resource.kind()).or_default().push(value);
    }
    let name = |kind: &str| kind.to_uppercase();
    values.into_iter().map(|(kind, values)| format!("DOCKER_RESOURCE_{}={}", name(kind), values.join(","))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Vec<GenericResource> {
        texts.iter().map(|text| text.parse().expect("it is readable")).collect()
    }

    #[track_caller]
    fn refused(of_node: &[&str], want: &str) {
        let told = check_of_node(&read(of_node)).map_or_else(|error| error.to_string(), |()| "taken".to_owned());
        assert!(told.contains(want), "{of_node:?}: {told}");
    }

    #[test]
    fn what_a_node_has_is_named_or_counted() {
        refused(&["gpu=a", "gpu=b", "ssd=3"], "taken");
        refused(&["gpu=a", "gpu=2"], "named and counted");
        refused(&["ssd=1", "ssd=2"], "twice");
        refused(&["gpu=a", "gpu=a"], "twice");
        refused(&["ssd=0"], "there cannot be 0");
        for text in ["gpu", "=a", "gpu=", "gpu=a,b", "a b=c"] {
            assert!(text.parse::<GenericResource>().is_err(), "{text}");
        }
        assert!(check_reserved(&read(&["gpu=2", "ssd=1"])).is_ok());
        assert!(check_reserved(&read(&["gpu=a"])).unwrap_err().to_string().contains("reserve a number"));
        assert!(check_reserved(&read(&["gpu=1", "gpu=1"])).is_err());
    }

    #[test]
    fn tasks_get_what_nobody_has() {
        let node = read(&["gpu=a", "gpu=b", "gpu=c", "ssd=3"]);
        let first = assign(&node, [].iter(), &read(&["gpu=2", "ssd=1"]));
        assert_eq!(first, read(&["gpu=a", "gpu=b", "ssd=1"]));
        let second = assign(&node, first.iter(), &read(&["gpu=1"]));
        assert_eq!(second, read(&["gpu=c"]));
        assert_eq!(variables(&first), ["DOCKER_RESOURCE_GPU=a,b", "DOCKER_RESOURCE_SSD=1"]);
        assert_eq!(count_of(&node, "gpu"), 3);
    }

    #[test]
    fn resources_are_told_as_the_api_has_them() {
        let json = serde_json::to_string(&read(&["gpu=a", "ssd=3"])).expect("it is JSON");
        assert_eq!(
            json,
            r#"[{"NamedResourceSpec":{"Kind":"gpu","Value":"a"}},{"DiscreteResourceSpec":{"Kind":"ssd","Value":3}}]"#
        );
        assert_eq!(serde_json::from_str::<Vec<GenericResource>>(&json).expect("it is read"), read(&["gpu=a", "ssd=3"]));
    }
}
