//! The shapes that the Engine API's description gives to its answers.

use std::sync::OnceLock;

use serde_json::{Map, Value, json};

const DESCRIBED: &str = include_str!("../schema/engine-api-1.56.json");

/// Where dockerd, and so its clients, have `ID` for what the description calls `Id`.
const SAYS_ID: [&str; 2] = ["/secrets/create", "/configs/create"];

/// What is wrong with the shape of an answer; nothing for answers that the description does not give a shape.
pub(crate) fn faults(method: &str, path: &str, status: u16, body: &Value) -> Vec<String> {
    let described = described();
    let path = path.split('?').next().unwrap_or_default();
    // An older version's answers may have members that later ones lost.
    if path.starts_with("/v1.") {
        return Vec::new();
    }
    let fixed = |pattern: &str| pattern.split('/').filter(|part| !part.starts_with('{')).count();
    let paths = described["paths"].as_object().map(Map::iter).into_iter().flatten();
    let matching = paths.filter(|(pattern, _)| matches(&segments(pattern), &segments(path)));
    let Some((_, methods)) = matching.max_by_key(|(pattern, _)| fixed(pattern)) else { return Vec::new() };
    if SAYS_ID.contains(&path) && status == 201 {
        return if body["ID"].is_string() { Vec::new() } else { vec!["no ID".to_owned()] };
    }
    let shape = match &methods[method][status.to_string()] {
        Value::Null if status >= 400 => &json!({ "$ref": "#/definitions/ErrorResponse" }),
        Value::Null => return Vec::new(),
        shape => shape,
    };
    let schema = json!({ "allOf": [shape], "definitions": described["definitions"] });
    let validator = jsonschema::draft4::new(&schema).expect("the description is a schema");
    validator.iter_errors(body).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

fn described() -> &'static Value {
    static PARSED: OnceLock<Value> = OnceLock::new();
    PARSED.get_or_init(|| serde_json::from_str(DESCRIBED).expect("the description is JSON"))
}

fn segments(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty()).collect()
}

/// Whether a path is one of a pattern's. Names of images have slashes in them.
fn matches(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        ([name, pattern_rest @ ..], [_, rest @ ..]) if name.starts_with('{') => {
            matches(pattern_rest, rest) || matches(pattern, rest)
        }
        ([fixed, pattern_rest @ ..], [part, rest @ ..]) => fixed == part && matches(pattern_rest, rest),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_shape_is_found() {
        let network = json!({ "Name": "web", "Id": "7", "Created": "2026-01-01T00:00:00Z", "Containers": {} });
        assert_eq!(faults("GET", "/networks/web?verbose=1", 200, &network), Vec::<String>::new());
        let wrong = json!({ "Name": 7 });
        assert_eq!(faults("GET", "/networks/web", 200, &wrong).len(), 1);
        assert_eq!(faults("GET", "/images/a/b/c/json", 404, &json!({})).len(), 1, "errors have a message");
        assert_eq!(faults("GET", "/networks", 200, &json!([wrong])).len(), 1);
        assert_eq!(faults("GET", "/networks", 200, &json!({})).len(), 1);
    }
}
