// Package chat is the generated client, in client.gen.go. That file is not committed: it follows from the document that
// the service serves.
package chat

// What the generated file needs. Named here, it stays in go.mod while there is no such file.
import _ "github.com/oapi-codegen/runtime"
