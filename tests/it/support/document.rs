//! Checks every response against the OpenAPI document: it must be documented, and have the documented form.

use std::sync::LazyLock;

use reqwest::Method;
use serde_json::{Map, Value};

use super::Response;

/// The OpenAPI document that the service prints.
pub(crate) fn document() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
        let text = chat_service::http::routes::public_api().document_json().expect("a document");
        serde_json::from_str(&text).expect("the document is JSON")
    });
    &DOCUMENT
}

/// Fails unless the document has this response of the operation. Paths and methods that are not in the document are not
/// checked.
pub(super) fn check(method: &Method, path: &str, response: &Response) {
    let paths = document()["paths"].as_object().expect("paths");
    let Some((template, item)) = paths.iter().find(|(template, _)| matches(template, path)) else { return };
    let Some(operation) = item.get(method.as_str().to_lowercase()) else { return };
    let place = format!("{method} {template} {}", response.status);
    let documented = operation["responses"].get(response.status.to_string());
    let documented =
        documented.unwrap_or_else(|| panic!("{place} is not in the OpenAPI document: {response:?}"));
    if matches!(response.status, 202 | 204) {
        assert!(response.body.is_empty() && documented.get("content").is_none(), "{place} has a body");
        return;
    }
    let content_type = response.header("content-type").unwrap_or_default();
    let content = documented["content"].get(content_type);
    let content = content.unwrap_or_else(|| panic!("{place} is not documented as {content_type}"));
    if !["text/event-stream", "application/x-ndjson"].contains(&content_type) {
        let body: Value = serde_json::from_slice(&response.body).expect("a JSON body");
        check_schema(&body, &content["schema"], &place);
    }
    for (name, header) in documented["headers"].as_object().into_iter().flatten() {
        let is_missing = header["required"] == true && !response.headers.contains_key(name);
        assert!(!is_missing, "{place}: the header {name} is missing");
    }
    for name in
        ["link", "stream-position", "warning", "idempotency-replayed", "www-authenticate", "retry-after"]
    {
        if response.headers.contains_key(name) {
            assert!(
                documented["headers"].get(name).is_some(),
                "{place}: the header {name} is not documented"
            );
        }
    }
}

fn matches(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template.iter().zip(path).all(|(part, given)| part.starts_with('{') || *part == given)
}

/// Supports as much of JSON Schema as the document uses. Members that a schema does not name are errors.
fn check_schema(value: &Value, schema: &Value, place: &str) {
    let schema = resolve(schema);
    let is = |kind: &Value| match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        other => panic!("{place}: a schema of type {other:?}: {schema}"),
    };
    let fits = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().any(is),
        kind => is(kind),
    };
    assert!(fits, "{place}: {value} is not of {schema}");
    if let Some(items) = value.as_array() {
        items.iter().for_each(|item| check_schema(item, &schema["items"], place));
    }
    let Some(members) = value.as_object() else { return };
    let empty = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        assert!(members.contains_key(required), "{place}: {required} is missing in {value}");
    }
    for (name, member) in members {
        let property = properties.get(name);
        let property = property.unwrap_or_else(|| panic!("{place}: the document does not know {name}"));
        check_schema(member, property, &format!("{place} {name}"));
    }
}

fn resolve(schema: &Value) -> &Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let pointer = reference.strip_prefix('#').unwrap_or_default();
            document().pointer(pointer).unwrap_or_else(|| panic!("{reference} points nowhere"))
        }
        None => schema,
    }
}
