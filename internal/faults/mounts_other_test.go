//go:build !linux

package faults

import (
	"errors"
	"syscall"
)

func privateMounts() *syscall.SysProcAttr { return nil }

func mountTmpfs(string, string) error { return errors.ErrUnsupported }
