package main

//lint:file-ignore SA1019 what 2026-07-28 deprecates, the revisions before it have, and the suite asks for

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// newServer makes a server with the tools of the clients' tests ("echo",
// "wait", "stubborn"), and those that the conformance suite calls by name.
func newServer(let <-chan struct{}) *mcp.Server {
	s := mcp.NewServer(&mcp.Implementation{Name: "interop", Version: "1"}, &mcp.ServerOptions{
		CompletionHandler: func(context.Context, *mcp.CompleteRequest) (*mcp.CompleteResult, error) {
			return &mcp.CompleteResult{Completion: mcp.CompletionResultDetails{Values: []string{"paris", "park", "party"}, Total: 3}}, nil
		},
		SubscribeHandler:   func(context.Context, *mcp.SubscribeRequest) error { return nil },
		UnsubscribeHandler: func(context.Context, *mcp.UnsubscribeRequest) error { return nil },
	})
	addTools(s, let)
	addResources(s)
	addPrompts(s)
	return s
}

// A picture of one pixel, and a sound of no samples.
var (
	pixel   = decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
	silence = []byte("RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00\x02\x00\x10\x00data\x00\x00\x00\x00")
)

func decode(s string) []byte {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		panic(err) // a constant
	}
	return b
}

func text(s string) mcp.Content { return &mcp.TextContent{Text: s} }

func embedded(uri string) mcp.Content {
	return &mcp.EmbeddedResource{Resource: &mcp.ResourceContents{URI: uri, MIMEType: "text/plain", Text: "embedded text"}}
}

func addTools(s *mcp.Server, let <-chan struct{}) {
	type none struct{}
	add := func(name string, do func(context.Context, *mcp.CallToolRequest) ([]mcp.Content, error)) {
		mcp.AddTool(s, &mcp.Tool{Name: name, Description: name}, func(ctx context.Context, req *mcp.CallToolRequest, _ none) (*mcp.CallToolResult, any, error) {
			content, err := do(ctx, req)
			if err != nil {
				return nil, nil, err
			}
			return &mcp.CallToolResult{Content: content}, nil, nil
		})
	}
	static := func(name string, content ...mcp.Content) {
		add(name, func(context.Context, *mcp.CallToolRequest) ([]mcp.Content, error) { return content, nil })
	}
	static("echo", text("hello"))
	add("wait", func(ctx context.Context, req *mcp.CallToolRequest) ([]mcp.Content, error) {
		if err := started(ctx, req); err != nil {
			return nil, err
		}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	add("stubborn", func(ctx context.Context, req *mcp.CallToolRequest) ([]mcp.Content, error) {
		if err := started(ctx, req); err != nil {
			return nil, err
		}
		<-let
		return []mcp.Content{text("too late")}, nil
	})

	static("test_simple_text", text("This is a simple text response for testing."))
	static("test_image_content", &mcp.ImageContent{Data: pixel, MIMEType: "image/png"})
	static("test_audio_content", &mcp.AudioContent{Data: silence, MIMEType: "audio/wav"})
	static("test_embedded_resource", embedded("test://embedded-resource"))
	static("test_multiple_content_types", text("Multiple content types test:"), &mcp.ImageContent{Data: pixel, MIMEType: "image/png"}, embedded("test://mixed-content-resource"))
	add("test_error_handling", func(context.Context, *mcp.CallToolRequest) ([]mcp.Content, error) {
		return nil, errors.New("this tool fails, as it is meant to")
	})
	add("test_tool_with_logging", func(ctx context.Context, req *mcp.CallToolRequest) ([]mcp.Content, error) {
		for _, line := range []string{"started", "working", "done"} {
			//nolint:staticcheck // as above
			if err := req.Session.Log(ctx, &mcp.LoggingMessageParams{Level: "info", Data: line}); err != nil {
				return nil, err
			}
		}
		return []mcp.Content{text("logged")}, nil
	})
	add("test_tool_with_progress", func(ctx context.Context, req *mcp.CallToolRequest) ([]mcp.Content, error) {
		for _, done := range []float64{0, 50, 100} {
			if err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{
				ProgressToken: req.Params.GetProgressToken(), Progress: done, Total: 100,
			}); err != nil {
				return nil, err
			}
		}
		return []mcp.Content{text(fmt.Sprint(req.Params.GetProgressToken()))}, nil
	})
	type prompt struct {
		Prompt string `json:"prompt"`
	}
	mcp.AddTool(s, &mcp.Tool{Name: "test_sampling"}, func(ctx context.Context, req *mcp.CallToolRequest, in prompt) (*mcp.CallToolResult, any, error) {
		//nolint:staticcheck // as above
		res, err := req.Session.CreateMessage(ctx, &mcp.CreateMessageParams{
			MaxTokens: 100, Messages: []*mcp.SamplingMessage{{Role: "user", Content: text(in.Prompt)}},
		})
		if err != nil {
			return nil, nil, err
		}
		answer, _ := res.Content.(*mcp.TextContent)
		return &mcp.CallToolResult{Content: []mcp.Content{text("LLM response: " + answer.Text)}}, nil, nil
	})
	type message struct {
		Message string `json:"message"`
	}
	mcp.AddTool(s, &mcp.Tool{Name: "test_elicitation"}, func(ctx context.Context, req *mcp.CallToolRequest, in message) (*mcp.CallToolResult, any, error) {
		res, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: in.Message, RequestedSchema: map[string]any{
			"type": "object", "properties": map[string]any{"username": map[string]any{"type": "string"}, "email": map[string]any{"type": "string"}},
			"required": []string{"username", "email"},
		}})
		if err != nil {
			return nil, nil, err
		}
		return &mcp.CallToolResult{Content: []mcp.Content{text(fmt.Sprintf("User response: action=%s, content=%v", res.Action, res.Content))}}, nil, nil
	})
}

// started tells the client that its call runs.
func started(ctx context.Context, req *mcp.CallToolRequest) error {
	token := req.Params.GetProgressToken()
	if token == nil {
		return nil
	}
	return req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: token, Progress: 1})
}

func addResources(s *mcp.Server) {
	read := func(c mcp.ResourceContents) mcp.ResourceHandler {
		return func(_ context.Context, req *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
			c := c
			c.URI = req.Params.URI
			return &mcp.ReadResourceResult{Contents: []*mcp.ResourceContents{&c}}, nil
		}
	}
	s.AddResource(&mcp.Resource{Name: "static-text", URI: "test://static-text", MIMEType: "text/plain"},
		read(mcp.ResourceContents{MIMEType: "text/plain", Text: "a static text"}))
	s.AddResource(&mcp.Resource{Name: "static-binary", URI: "test://static-binary", MIMEType: "image/png"},
		read(mcp.ResourceContents{MIMEType: "image/png", Blob: pixel}))
	s.AddResource(&mcp.Resource{Name: "watched-resource", URI: "test://watched-resource", MIMEType: "text/plain"},
		read(mcp.ResourceContents{MIMEType: "text/plain", Text: "watched"}))
	s.AddResourceTemplate(&mcp.ResourceTemplate{Name: "template", URITemplate: "test://template/{id}/data", MIMEType: "application/json"},
		func(_ context.Context, req *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
			id := strings.TrimSuffix(strings.TrimPrefix(req.Params.URI, "test://template/"), "/data")
			return &mcp.ReadResourceResult{Contents: []*mcp.ResourceContents{{
				URI: req.Params.URI, MIMEType: "application/json", Text: fmt.Sprintf(`{"id":%q,"templateTest":true,"data":"Data for ID: %s"}`, id, id),
			}}}, nil
		})
}

func addPrompts(s *mcp.Server) {
	add := func(name string, arguments []string, content func(map[string]string) []mcp.Content) {
		p := &mcp.Prompt{Name: name, Description: name}
		for _, a := range arguments {
			p.Arguments = append(p.Arguments, &mcp.PromptArgument{Name: a, Description: a, Required: true})
		}
		s.AddPrompt(p, func(_ context.Context, req *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			res := &mcp.GetPromptResult{}
			for _, c := range content(req.Params.Arguments) {
				res.Messages = append(res.Messages, &mcp.PromptMessage{Role: "user", Content: c})
			}
			return res, nil
		})
	}
	add("test_simple_prompt", nil, func(map[string]string) []mcp.Content {
		return []mcp.Content{text("This is a simple prompt for testing.")}
	})
	add("test_prompt_with_arguments", []string{"arg1", "arg2"}, func(a map[string]string) []mcp.Content {
		return []mcp.Content{text(fmt.Sprintf("Prompt with arguments: arg1='%s', arg2='%s'", a["arg1"], a["arg2"]))}
	})
	add("test_prompt_with_embedded_resource", []string{"resourceUri"}, func(a map[string]string) []mcp.Content {
		return []mcp.Content{embedded(a["resourceUri"]), text("Please process the embedded resource above.")}
	})
	add("test_prompt_with_image", nil, func(map[string]string) []mcp.Content {
		return []mcp.Content{&mcp.ImageContent{Data: pixel, MIMEType: "image/png"}, text("Please analyze the image above.")}
	})
}
