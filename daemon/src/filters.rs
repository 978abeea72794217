//! The `filters` parameter of lists: `{"name":["web"]}` or, from older clients, `{"name":{"web":true}}`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use skep_api::Timestamp;
use skep_api::units::parse_duration;

/// What a list is narrowed down to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filters(BTreeMap<String, BTreeSet<String>>);

impl Filters {
    /// Reads the parameter; a name that is not in `known` is an error.
    pub(crate) fn parse(text: Option<&str>, known: &[&str]) -> Result<Self, String> {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(Self::default()) };
        let json: BTreeMap<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("invalid filter {text:?}: {error}"))?;
        let mut filters = BTreeMap::new();
        for (name, values) in json {
            if !known.contains(&name.as_str()) {
                return Err(format!("invalid filter '{name}': use one of {}", known.join(", ")));
            }
            let values: BTreeSet<String> = match values {
                Value::Array(list) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                Value::Object(map) => {
                    map.into_iter().filter(|(_, on)| on != &Value::Bool(false)).map(|(v, _)| v).collect()
                }
                other => return Err(format!("invalid filter '{name}': {other} is no list")),
            };
            filters.insert(name, values);
        }
        Ok(Self(filters))
    }

    /// Whether any of the filter's values passes `test`, or the filter is not set.
    pub(crate) fn any(&self, name: &str, test: impl Fn(&str) -> bool) -> bool {
        self.0.get(name).is_none_or(|values| values.iter().any(|value| test(value)))
    }

    /// Whether all of the filter's `key` or `key=value` are among `labels`.
    pub(crate) fn labels(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.0.get(name).is_none_or(|wanted| {
            wanted.iter().all(|text| match text.split_once('=') {
                Some((key, value)) => labels.get(key).is_some_and(|have| have == value),
                None => labels.contains_key(text),
            })
        })
    }

    /// Whether any of the filter's `key` or `key=value` is among `labels`.
    pub(crate) fn any_label(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(name).any(|text| match text.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|have| have == value),
            None => labels.contains_key(text),
        })
    }

    /// The filter as a switch; `None` if it is not set.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, String> {
        self.values(name)
            .next()
            .map(|text| match text {
                "1" | "true" | "True" => Ok(true),
                "0" | "false" | "False" => Ok(false),
                other => Err(format!("invalid filter '{name}={other}': use true or false")),
            })
            .transpose()
    }

    /// The time of the `until` filter: a time, or how long ago.
    pub(crate) fn until(&self) -> Result<Option<Timestamp>, String> {
        let Some(text) = self.values("until").next() else { return Ok(None) };
        let now = Timestamp::from_system(std::time::SystemTime::now());
        let ago = parse_duration(text).map(|ago| Timestamp::from_nanos(now.as_nanos() - ago.as_nanos() as i64));
        ago.or_else(|| Timestamp::parse(text)).map(Some).ok_or_else(|| format!("until={text:?} is no time"))
    }

    /// The filter's values.
    pub(crate) fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.get(name).into_iter().flatten().map(String::as_str)
    }

    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_unknown_names_are_refused() {
        let list = Filters::parse(Some(r#"{"name":["web"]}"#), &["name"]).unwrap();
        let map = Filters::parse(Some(r#"{"name":{"web":true}}"#), &["name"]).unwrap();
        assert_eq!(list, map);
        assert!(list.any("name", |value| value == "web") && !list.any("name", |value| value == "api"));
        assert!(list.any("id", |_| false), "a filter that is not set lets all pass");
        assert!(Filters::parse(Some(r#"{"colour":["red"]}"#), &["name"]).unwrap_err().contains("colour"));
        assert!(Filters::parse(Some("nonsense"), &["name"]).is_err());
    }

    #[test]
    fn labels_match_by_key_or_by_key_and_value() {
        let filters = Filters::parse(Some(r#"{"label":["a","b=2"]}"#), &["label"]).unwrap();
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|&(k, v)| (k.into(), v.into())).collect();
        assert!(filters.labels("label", &labels(&[("a", ""), ("b", "2")])));
        assert!(!filters.labels("label", &labels(&[("a", ""), ("b", "3")])));
    }
}
